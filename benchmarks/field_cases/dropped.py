"""Something was dropped or taken without a word: a wrong result, exit code 0, and a convincing report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import builders
import torch
from safetensors.torch import load_file, save_file

from .common import (
    SHORT,
    Arguments,
    Case,
    Checked,
    Result,
    baseline,
    both,
    counts,
    done,
    either,
    figure,
    of_a_finished_run,
    refused,
    run,
    warned,
)

# ---------------------------------------------------------------- splits, folders, files


def training_and_testing(folder: Path) -> Arguments:
    data = folder / "data"
    builders.image_folder(data, per_class=12, splits=["Training"])
    builders.image_folder(data, per_class=8, splits=["Testing"], seed=1)
    return run(builders.timm_checkpoint(folder / "model"), folder, data=data)


def a_folder_too_many(folder: Path) -> Arguments:
    data = builders.image_folder(folder / "data", splits=["train", "test", "extra"])
    return run(builders.timm_checkpoint(folder / "model"), folder, data=data)


def a_table_too_many(folder: Path) -> Arguments:
    for number, name in enumerate(("train", "test", "february")):
        builders.text_csv(folder / f"data/{name}.csv", seed=number)
    return run(builders.bert_checkpoint(folder / "model"), folder, data=folder / "data")


def matched_and_mismatched(folder: Path, *options: Any) -> Arguments:
    """MNLI's splits, as `save_to_disk` writes them; the test labels are hidden."""
    import datasets

    def split(name: str, rows: int, hidden: bool = False) -> Any:
        texts = [f"{word} {other} {name}" for word in builders.WORDS for other in builders.WORDS][:rows]
        kind = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
        labels = [-1 if hidden else row % 2 for row in range(rows)]
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=kind)

    names = {"train": (60, False), "validation_matched": (20, False), "validation_mismatched": (16, False),
             "test_matched": (8, True), "test_mismatched": (8, True)}  # fmt: skip
    datasets.DatasetDict({name: split(name, *given) for name, given in names.items()}).save_to_disk(folder / "data")
    return run(builders.bert_checkpoint(folder / "model"), folder, *options, data=folder / "data")


def named_splits(folder: Path) -> Arguments:
    chosen = ("--eval-split", "validation_matched", "--holdout-split", "validation_mismatched")
    return matched_and_mismatched(folder, *chosen)


def a_linked_folder(folder: Path) -> Arguments:
    data = builders.image_folder(folder / "data", per_class=8, splits=[])
    builders.image_folder(folder / "elsewhere", classes=["cam"], per_class=44, splits=[], seed=1)
    (data / "a/cam1").symlink_to(folder / "elsewhere/cam", target_is_directory=True)
    return run(builders.timm_checkpoint(folder / "model"), folder, data=data)


def a_link_in_a_circle(folder: Path) -> Arguments:
    data = builders.image_folder(folder / "data", per_class=8, splits=[])
    (data / "a/again").symlink_to(data / "a", target_is_directory=True)
    return run(builders.timm_checkpoint(folder / "model"), folder, data=data)


# ---------------------------------------------------------------- weights and names


def two_sets_of_weights(folder: Path, *options: Any, names: tuple[str, str] = ("model", "model_ema")) -> Arguments:
    """What timm's train.py writes with --model-ema. The second set is the first plus a little."""
    model = builders.timm_checkpoint(folder / "model")
    tensors = load_file(model / "model.safetensors")
    moved = {n: t + 0.01 if t.is_floating_point() else t for n, t in tensors.items()}
    (model / "model.safetensors").unlink()
    torch.save({"epoch": 3, names[0]: tensors, names[1]: moved}, model / "pytorch_model.bin")
    save_file(tensors, folder / "first.safetensors")
    save_file(moved, folder / "second.safetensors")
    data = builders.image_folder(folder / "data")
    return baseline(model, folder, "--allow-pickle", *options, data=data)


def weights_are(name: str, *words: str) -> Any:
    """The output of a run that trains nothing has the tensors of this file, and what was taken is said."""

    def check(result: Result) -> Checked:
        file = result.folder / "out/model.safetensors"
        if result.code or not file.is_file():
            return result.message, False
        held = {n: load_file(result.folder / f"{n}.safetensors") for n in ("first", "second")}
        out = load_file(file)
        taken = [n for n, tensors in held.items() if all(torch.equal(out[key], tensors[key]) for key in tensors)]
        said = result.said(*words)
        return f"{' '.join(taken) or 'neither'} taken{', said' if said else ', nothing said'}", taken == [name] and said

    return check


def one_name_too_many(folder: Path) -> Arguments:
    model = builders.timm_checkpoint(folder / "model")
    config = json.loads((model / "config.json").read_text())
    config["label_names"] = ["background", "a", "b", "c"]
    (model / "config.json").write_text(json.dumps(config))
    return run(model, folder, data=builders.image_folder(folder / "data"))


def fitted_bert(folder: Path, classes: int) -> tuple[Path, list[str], list[int]]:
    """A BERT with LABEL_0, LABEL_1, … whose head is fitted to tell sentences by their word, the sentences, their classes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model_folder = builders.bert_checkpoint(folder / "model", labels=classes)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    words = builders.WORDS[:classes]
    texts = [f"{word} {word} {word} {other}" for other in builders.WORDS[12:24] for word in words]
    ids = torch.arange(len(texts)) % classes
    with torch.no_grad():
        pooled = model.bert(**tokenizer(texts, return_tensors="pt", padding=True)).pooler_output
        wanted = torch.nn.functional.one_hot(ids, classes).float()
        model.classifier.weight.copy_(10 * torch.linalg.lstsq(pooled, wanted, driver="gelsd").solution.T)
        model.classifier.bias.zero_()
        right = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.argmax(1) == ids
    model.save_pretrained(model_folder)
    (folder / "right.json").write_text(json.dumps(float(right.float().mean())))
    return model_folder, texts, ids.tolist()


def labelled(path: Path, texts: list[str], labels: list[str]) -> Path:
    lines = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def label_k(folder: Path) -> Arguments:
    model, texts, ids = fitted_bert(folder, 12)
    data = labelled(folder / "train.csv", texts, [f"LABEL_{number}" for number in ids])
    return baseline(model, folder, "--eval-data", data, data=data)


def names_in_another_order(folder: Path) -> Arguments:
    model, texts, ids = fitted_bert(folder, 3)
    data = labelled(folder / "train.csv", texts, [["zero", "one", "two"][number] for number in ids])
    return baseline(model, folder, "--eval-data", data, data=data)


def transformers_accuracy(result: Result) -> float:
    return float(json.loads((result.folder / "right.json").read_text()))


# ---------------------------------------------------------------- rows and columns


def sixty_lines(path: Path, between: str) -> Path:
    """60 rows below a head, of which two begin with a quotation mark that is never closed."""
    lines = [f"{word} {other} cat{between}{'neg' if row % 2 else 'pos'}" for row, (word, other) in enumerate(
        [(word, other) for word in builders.WORDS[:6] for other in builders.WORDS[:10]])]  # fmt: skip
    lines[9], lines[29] = f'"{lines[9]}', f'"{lines[29]}'
    path.write_text("\n".join([f"text{between}label", *lines]) + "\n")
    return path


def tsv_quotes(folder: Path) -> Arguments:
    return run(builders.bert_checkpoint(folder / "model"), folder, data=sixty_lines(folder / "train.tsv", "\t"))


def csv_quotes(folder: Path) -> Arguments:
    return run(builders.bert_checkpoint(folder / "model"), folder, data=sixty_lines(folder / "train.csv", ","))


def all_sixty(result: Result) -> Checked:
    used, skipped = sum(result.rows(part) for part in ("train", "holdout", "eval")), len(result.skipped)
    return f"{used} rows used, {skipped} skipped, of 60 lines", result.code == 0 and used + skipped == 60


def two_texts(folder: Path, names: tuple[str, str]) -> Arguments:
    """A table of two text columns; the label is told by both."""
    lines = [
        f"{word} cat,{other} dog,{['neg', 'pos'][row % 2]}"
        for row, (word, other) in enumerate([(w, o) for w in builders.WORDS[:5] for o in builders.WORDS[:6]])
    ]
    (folder / "train.csv").write_text("\n".join([f"{names[0]},{names[1]},label", *lines]) + "\n")
    return run(builders.bert_checkpoint(folder / "model"), folder, data=folder / "train.csv")


def column_is_spoken_for(first: str, second: str) -> Any:
    """Both columns are used, or what is used is said and the other is named, or the data are refused, naming both."""

    def check(result: Result) -> Checked:
        used = json.dumps(result.report.get("data", {}).get("columns", {}))
        both_used = result.code == 0 and first in used and second in used
        named = result.code == 0 and second in used and first in result.warnings
        told = result.code == 2 and result.said(first, second)
        fact = result.message if result.code else f"columns said: {used}; {first} named: {first in result.warnings}"
        return fact, both_used or named or told

    return check


COLUMNS = ("--text-column", "utterance", "--label-column", "intent")


def everything_is_said(folder: Path) -> Arguments:
    for number, name in enumerate(("train", "dev", "test")):
        file = builders.text_csv(folder / f"data/{name}.csv", seed=number)
        file.write_text(file.read_text().replace("text,label", "utterance,intent"))
    return run(builders.bert_checkpoint(folder / "model"), folder, *COLUMNS, data=folder / "data")


def lacking(text: str, *words: str) -> list[str]:
    """Those of the words that the text does not hold."""
    return [word for word in words if not re.search(rf"\b{word}\b", text)]


@of_a_finished_run
def sources_everywhere(result: Result) -> Checked:
    """Each part's file with its rows, and the columns: report.json, report.html, the card, standard error."""
    data = result.report["data"]
    sources = {one.get("part"): one for one in data.get("sources", [])}
    if not {"train", "holdout", "eval"} <= set(sources) or not data.get("columns") or not data.get("rule"):
        return "report.json does not say which files and columns train, select and judge", False
    texts = {
        "report.json": json.dumps(data),
        "report.html": (result.folder / "out/dsd/report.html").read_text(),
        "the card": (result.folder / "out/README.md").read_text(),
        "standard error": result.err,
    }
    missing = {name: lacking(text, "dev", "test", "utterance", "intent") for name, text in texts.items()}
    told = [f"{name} lacks {' '.join(words)}" for name, words in missing.items() if words]
    return "; ".join(told) or f"said in {', '.join(texts)}", not told


def planned(folder: Path) -> Arguments:
    args = everything_is_said(folder)
    return ["plan", args[0], "--data", folder / "data", *COLUMNS, "--json"]


def plan_says_all(result: Result) -> Checked:
    missing = lacking(result.out, "train", "dev", "test", "utterance", "intent")
    return f"plan lacks {' '.join(missing)}" if missing else "plan names all", result.code == 0 and not missing


# ---------------------------------------------------------------- models that see too much, files beside the weights


def sees_all(folder: Path, kind: str) -> Arguments:
    """A language model without a causal mask, under a class that is made for one."""
    import transformers

    words = len(builders.SPECIAL) + len(builders.WORDS)
    with builders.seeded(0):
        if kind == "xlnet":
            config = transformers.XLNetConfig(vocab_size=words, d_model=32, n_layer=2, n_head=2, d_inner=48)
            model: Any = transformers.XLNetLMHeadModel(config)
        elif kind == "xlm":
            config = transformers.XLMConfig(vocab_size=words, emb_dim=32, n_layers=2, n_heads=2, n_langs=1)
            model = transformers.XLMWithLMHeadModel(config)
        else:
            config = transformers.BertConfig(vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                             intermediate_size=48, max_position_embeddings=32)  # fmt: skip
            model = transformers.BertLMHeadModel(config)
    builders.save_transformers(model, folder / "model", builders.word_tokenizer())
    data = builders.text_file(folder / "train.txt")
    return run(folder / "model", folder, "--task", "causal-lm", data=data)


def beside_speech(folder: Path, name: str) -> Arguments:
    model = builders.ctc_checkpoint(folder / "model")
    file = model / name
    file.parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({"adapter.weight": torch.ones(3)}, file)
    else:
        file.write_bytes(bytes(range(256)) * 16)
    return run(model, folder, data=builders.speech_folder(folder / "data"))


def copied(name: str) -> Any:
    def check(result: Result) -> Checked:
        file, source = result.folder / "out" / name, result.folder / "model" / name
        same = file.is_file() and file.read_bytes() == source.read_bytes()
        return f"{name} {'copied byte for byte' if same else 'not copied'}", result.code == 0 and same

    return check


def adapter_beside_weights(folder: Path) -> Arguments:
    model = builders.gpt2_checkpoint(folder / "model")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "target_modules": ["c_attn"]}
    (model / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 32)},
              model / "adapter_model.safetensors")  # fmt: skip
    return run(model, folder, data=builders.text_file(folder / "train.txt"))


def doubled_start(folder: Path) -> Arguments:
    """Texts that a chat template has rendered, with its start token; the tokenizer puts another before."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    names = {name: number for number, name in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", "[MASK]", *builders.WORDS])}
    raw = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="[UNK]",
                                        pad_token="[PAD]", model_max_length=32)  # fmt: skip
    model = builders.gpt2_checkpoint(folder / "model")
    builders.save_transformers(AutoModelForCausalLM.from_pretrained(model), model, tokenizer)
    texts = [f"<s> {text}" for text in builders.text_file(folder / "plain.txt").read_text().split("\n\n")]
    (folder / "train.txt").write_text("\n\n".join(texts))
    return run(model, folder, data=folder / "train.txt")


def variance_out_of_range(folder: Path) -> Arguments:
    """A float16 ResNet whose first BatchNorm sees variances that pass float16's largest number with the first step."""
    model = builders.timm_checkpoint(folder / "model")
    tensors = load_file(model / "model.safetensors")
    first = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    variance = next(name for name in tensors if name.endswith("running_var"))
    tensors[first] = tensors[first] * 5000
    tensors[variance] = torch.full_like(tensors[variance], 64000)
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(halves, model / "model.safetensors", {"format": "pt"})
    data = builders.image_folder(folder / "data")
    return [model, "--data", data, "-o", folder / "out", *SHORT, "--control", "dense", "--control", "random"]


def stopped_at_first_look(result: Result) -> Checked:
    """Before the second arm began, with tensor and limit named."""
    log = result.folder / "out.partial/log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    arms = {line["arm"] for line in lines if line["event"] == "step"}
    named = result.said("running_var", "65,?504|float16")
    good = result.code in (2, 5) and named and arms <= {"refined"}
    return f"after steps of {', '.join(sorted(arms)) or 'no arm'}: {result.message}", good


def end_token_in_a_text(folder: Path) -> Arguments:
    """BART answers at its last end token: a text that holds one has two."""
    import transformers

    names = ["<s>", "<pad>", "</s>", "<unk>"]
    config = transformers.BartConfig(
        vocab_size=4 + len(builders.WORDS), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1},
    )  # fmt: skip
    with builders.seeded(0):
        model = transformers.BartForSequenceClassification(config)
    builders.save_transformers(model, folder / "model", bart_tokenizer(names))
    data = builders.text_csv(folder / "train.csv")
    lines = data.read_text().splitlines()
    lines[5] = f"the cat </s> {lines[5]}"
    data.write_text("\n".join(lines) + "\n")
    return run(folder / "model", folder, data=data)


def bart_tokenizer(names: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({n: i for i, n in enumerate([*names, *builders.WORDS])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 0), ("</s>", 2)]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>", model_max_length=32)  # fmt: skip


def one_row_is_skipped(result: Result) -> Checked:
    rows = result.skipped
    fact = f"{len(rows)} rows skipped: {rows[0]['reason'] if rows else 'none'}" if result.code == 0 else result.message
    return fact, result.code == 0 and [row["row"] for row in rows] == [4]


CASES = [
    Case("A1", "folders Training/ and Testing/, 36 and 24 pictures", "Testing's 24 pictures ignored, all parts carved from "
         "Training, exit 0", (0, "'rows': 6"), training_and_testing, counts(trained=36, eval=24)),
    Case("A2", "folders train/, test/ and extra/", "extra/ ignored without a word, exit 0", (0, "'rows': 24"),
         a_folder_too_many, either(refused("extra"), warned("extra"))),
    Case("A3", "tables train.csv, test.csv and february.csv", "february.csv ignored without a word, exit 0", (0, "'rows': 24"),
         a_table_too_many, either(refused("february"), warned("february"))),
    Case("A4", "MNLI's splits on disk: validation_matched, validation_mismatched", "both validation splits ignored, all three "
         "parts carved from train, exit 0", (0, "'rows': 12"),
         matched_and_mismatched, refused("validation_matched", "--eval-split|--holdout-split")),
    Case("A5", "the same with --eval-split and --holdout-split", "no such options, exit 2", (2, "No such option"),
         named_splits, counts(train=60, holdout=16, eval=20)),
    Case("A6", "a class folder that holds a link to a folder of 44 pictures", "the linked pictures ignored: 24 of 68 rows, "
         "exit 0", (0, ""), a_linked_folder, either(counts(all=68), warned("cam1"), refused("cam1"))),
    Case("A7", "a class folder that holds a link to itself", "not followed: 24 rows, exit 0", (0, "'rows'"),
         a_link_in_a_circle, either(counts(all=24), refused("again")), already=True),
    Case("A8", "a .bin with `model` and `model_ema`", "the raw weights taken, unsaid, exit 0", (0, ""),
         two_sets_of_weights, weights_are("second", "model_ema")),
    Case("A9", "the same with --weights-key model", "no such option, exit 2", (2, "No such option"),
         lambda folder: two_sets_of_weights(folder, "--weights-key", "model"), weights_are("first")),
    Case("A10", "a .bin with `teacher` and `student`", "refused: not a plain mapping of names to tensors, exit 2",
         (2, "plain mapping"), lambda folder: two_sets_of_weights(folder, names=("teacher", "student")),
         refused("teacher", "student", "--weights-key")),
    Case("A11", "label_names with 4 names, a head of 3 classes", "the names dropped, sorted order used, exit 0", (0, "sorted"),
         one_name_too_many, refused("label_names", r"\b4\b", r"\b3\b")),
    Case("A12", "12 classes LABEL_0 … LABEL_11, data labelled so", "sorted as text, LABEL_10 before LABEL_2: the baseline is "
         "wrong, exit 0", (0, "sorted"), label_k, figure("baseline", "accuracy", transformers_accuracy)),
    Case("A13", "classes without names, data named in another order", "sorted order used: a baseline of 0, exit 0",
         (0, "sorted"), names_in_another_order, refused("zero", "one", "order|assign|label_names")),
    Case("A14", "a TSV of 60 lines, two texts begin with a quotation mark", "40 rows; 20 lines became one text, exit 0",
         (0, "'rows'"), tsv_quotes, all_sixty),
    Case("A15", "the same as CSV", "40 rows; 20 lines became one text, unsaid, exit 0", (0, "'rows'"),
         csv_quotes, either(warned(r"lines? \d+"), refused(r"lines? \d+"))),
    Case("A16", "columns question, sentence, label", "sentence alone, unsaid, exit 0", (0, ""),
         lambda folder: two_texts(folder, ("question", "sentence")), column_is_spoken_for("question", "sentence")),
    Case("A17", "columns title, content, label", "content alone, unsaid, exit 0", (0, ""),
         lambda folder: two_texts(folder, ("title", "content")), column_is_spoken_for("title", "content")),
    Case("A18", "XLNet as causal-lm", "trained: the loss falls, for it copies its answer, exit 0", (0, ""),
         lambda folder: sees_all(folder, "xlnet"), refused("later tokens?|sees ")),
    Case("A19", "a BERT that was built without is_decoder, as causal-lm", "trained: it copies its answer, exit 0", (0, ""),
         lambda folder: sees_all(folder, "bert"), refused("later tokens?|sees ", "is_decoder")),
    Case("A20", "an XLM that was built without causality, as causal-lm", "trained: it copies its answer, exit 0", (0, ""),
         lambda folder: sees_all(folder, "xlm"), refused("later tokens?|sees ")),
    Case("A21", "which file trains, selects and judges, which columns", "said nowhere: not in the "
         "output, report.json, report.html or the card", (0, ""), everything_is_said, sources_everywhere),
    Case("A22", "the same in `plan --json`", "row counts alone, exit 0", (0, "24 train"), planned, plan_says_all),
    Case("A23", "language_model/5gram.bin of a speech recogniser", "not copied: \"other copies of the weights\", exit 0",
         (0, "not copied"), lambda folder: beside_speech(folder, "language_model/5gram.bin"),
         copied("language_model/5gram.bin")),
    Case("A24", "adapter.fra.safetensors of a speech recogniser", "not copied: \"other copies of the weights\", exit 0",
         (0, "not copied"), lambda folder: beside_speech(folder, "adapter.fra.safetensors"),
         copied("adapter.fra.safetensors")),
    Case("A25", "full weights with a LoRA adapter beside them", "the output holds the adapter's config without its weights, "
         "exit 0", (0, "adapter_model"), adapter_beside_weights, refused("adapter", "merge")),
    Case("A26", "texts that begin with <s>, to a tokenizer that adds one", "nothing said, exit 0", (0, ""),
         doubled_start, warned("<s>")),
    Case("A27", "a float16 ResNet whose running variance passes 65504", "all arms trained and scored, then \"holds values "
         "that float16 cannot\", exit 5", (5, "cannot"), variance_out_of_range, stopped_at_first_look),
    Case("A28", "BART as classifier, a text holds </s>", "a traceback in the middle, exit 1", (1, "Traceback|bug"),
         end_token_in_a_text, both(done, one_row_is_skipped)),
]  # fmt: skip
