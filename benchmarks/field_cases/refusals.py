"""Refused, and should not be."""

from __future__ import annotations

import argparse
import gzip
import json
import tomllib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builders
import torch
from safetensors.torch import load_file, save_file

from .common import (
    Arguments,
    Case,
    Check,
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

SHARE = {"neg": 0, "pos": 1}


def timm_wrapper(folder: Path) -> Arguments:
    """A timm model as transformers' own class for it saves it."""
    from transformers import AutoModelForImageClassification

    plain = builders.timm_checkpoint(folder / "timm", in_chans=3)
    config = json.loads((plain / "config.json").read_text())
    del config["model_args"]  # which transformers would give to timm a second time
    (plain / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageClassification.from_pretrained(plain)
    model.save_pretrained(folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    config["model_args"] = None
    (folder / "model/config.json").write_text(json.dumps(config))
    return run(folder / "model", folder, data=builders.image_folder(folder / "data", channels=3))


def more_tokens_than_rows(folder: Path) -> Arguments:
    model = builders.gpt2_checkpoint(folder / "model")
    tokenizer = builders.word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    return run(model, folder, data=builders.text_file(folder / "train.txt"))


def rwkv(folder: Path) -> Arguments:
    import transformers

    words = len(builders.SPECIAL) + len(builders.WORDS)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48}
    with builders.seeded(0):
        model = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=words, context_length=32, **sizes))
    builders.save_transformers(model, folder / "model", builders.word_tokenizer())
    return run(folder / "model", folder, data=builders.text_file(folder / "train.txt"))


def sentencepiece_alone(folder: Path) -> Arguments:
    """A DeBERTa-v3 whose tokenizer is an spm.model and nothing else."""
    import sentencepiece
    import transformers

    sentences = [line.rpartition(",")[0] for line in builders.text_csv(folder / "train.csv", rows=60).read_text().splitlines()]
    (folder / "model").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences[1:]), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
        minloglevel=2,
    )  # fmt: skip
    (folder / "spm.model").rename(folder / "model/spm.model")
    (folder / "model/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "DebertaV2Tokenizer", "vocab_type": "spm"})
    )
    config = transformers.DebertaV2Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, type_vocab_size=0, pad_token_id=0, id2label={0: "neg", 1: "pos"}, label2id=SHARE,
    )  # fmt: skip
    with builders.seeded(0):
        transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder / "model")
    return run(folder / "model", folder, data=folder / "train.csv")


@of_a_finished_run
def a_dependency(result: Result) -> Checked:
    """What reads an spm.model is installed with the package."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    listed = any(name.startswith("sentencepiece") for name in project["dependencies"])
    return f"opened; sentencepiece is {'a' if listed else 'no'} dependency", listed


def two_forms_of_one_name(folder: Path) -> Arguments:
    """Folders as macOS writes them (decomposed), names as a keyboard does (composed)."""
    names = ["café", "crème", "pâte"]
    model = builders.timm_checkpoint(folder / "model", classes=[unicodedata.normalize("NFC", name) for name in names])
    data = builders.image_folder(folder / "data", classes=[unicodedata.normalize("NFD", name) for name in names])
    return run(model, folder, data=data)


def alike_but_not_equal(folder: Path) -> Arguments:
    """The data's "cat" is written with a Cyrillic a."""
    model = builders.bert_checkpoint(folder / "model", labels=("cat", "dog"))
    return run(model, folder, data=builders.text_csv(folder / "train.csv", labels=("c\u0430t", "dog")))


SYNSETS = ("n01440764", "n01443537")  # tench and goldfish


def imagenet_head(folder: Path, classes: int, tench: int) -> Arguments:
    """A head of an ImageNet of this size that always says tench, on folders of tench (10) and goldfish (6) named by synset."""
    model = builders.timm_checkpoint(folder / "model", classes=classes)
    tensors = load_file(model / "model.safetensors")
    weight, bias = (next(n for n, t in tensors.items() if t.ndim == ndim and len(t) == classes) for ndim in (2, 1))
    tensors[weight], tensors[bias] = torch.zeros_like(tensors[weight]), torch.zeros(classes)
    tensors[bias][tench] = 10.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data = folder / "data"
    builders.image_folder(data, classes=SYNSETS[:1], per_class=10, splits=["train", "test"])
    builders.image_folder(data, classes=SYNSETS[1:], per_class=6, splits=["train", "test"], seed=1)
    return baseline(model, folder, data=data)


def place_of_tench(subset: str) -> int:
    from timm.data import ImageNetInfo

    return int(ImageNetInfo(subset).label_names().index(SYNSETS[0]))


def many_classes_of_few_rows(folder: Path) -> Arguments:
    names = [f"c{number:03}" for number in range(100)]
    data = builders.image_folder(folder / "data", classes=names, per_class=4, size=16)
    return run(builders.timm_checkpoint(folder / "model", classes=names, size=16), folder, data=data)


def a_holdout_of_each_class(result: Result) -> Checked:
    rows = result.rows("holdout")
    return f"{rows} holdout rows of 100 classes", result.code == 0 and rows >= 100


def other_names(folder: Path, *options: Any, declared: bool = True) -> Arguments:
    """A model of NEGATIVE and POSITIVE that always says POSITIVE; data of neg (9 rows) and pos (15)."""
    import datasets

    model = builders.bert_checkpoint(folder / "model", labels=("NEGATIVE", "POSITIVE"))
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.weight"].zero_()
    tensors["classifier.bias"] = torch.tensor([0.0, 5.0])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    texts = [f"{word} {other}" for word in builders.WORDS[:4] for other in builders.WORDS[:6]]
    labels = [int(row >= 9) for row in range(24)]
    kind = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "data")
    return baseline(model, folder, *options, data=folder / "data")


def saved_by_a_trainer(folder: Path) -> Arguments:
    """What timm's train.py saves: its arguments beside the weights."""
    model = builders.timm_checkpoint(folder / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    held = {
        "epoch": 9,
        "arch": "test_resnet",
        "state_dict": tensors,
        "args": argparse.Namespace(lr=0.1, opt="sgd"),
        "version": 2,
    }
    torch.save(held, model / "pytorch_model.bin")
    return run(model, folder, "--allow-pickle", data=builders.image_folder(folder / "data"))


# ---------------------------------------------------------------- forms of data


def table(rows: int = 24, seed: int = 0, **columns: str) -> list[dict[str, str]]:
    """Rows of `text` and `label`, under other column names where these are given."""
    import csv
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        lines = builders.text_csv(Path(place, "t.csv"), rows=rows, seed=seed).read_text().splitlines()
    names = {"text": "text", "label": "label", **columns}
    return [{names[key]: value for key, value in row.items()} for row in csv.DictReader(lines)]


def bert_on(folder: Path, data: Path, *options: Any) -> Arguments:
    return run(builders.bert_checkpoint(folder / "model"), folder, *options, data=data)


def hub_folder(folder: Path) -> Arguments:
    """A data set as it is downloaded from the Hub: shards under data/, and a README that says which split they are."""
    import datasets

    place = folder / "data/data"
    place.mkdir(parents=True)
    datasets.Dataset.from_list(table()).to_parquet(place / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(table(12, 1)).to_parquet(place / "test-00000-of-00001.parquet")
    files = [{"split": split, "path": f"data/{split}-*"} for split in ("train", "test")]
    head = json.dumps({"configs": [{"config_name": "default", "data_files": files}]})
    (folder / "data/README.md").write_text(f"---\n{head}\n---\n# A data set\n")
    return bert_on(folder, folder / "data")


def shards(folder: Path) -> Arguments:
    (folder / "data").mkdir()
    for number in range(3):
        lines = [json.dumps(row) for row in table(12, number)]
        (folder / f"data/part-{number:05}.jsonl").write_text("\n".join(lines) + "\n")
    return bert_on(folder, folder / "data")


def folder_of_texts(folder: Path) -> Arguments:
    for number in range(4):
        builders.text_file(folder / f"data/{number}.txt", paragraphs=6, seed=number)
    return run(builders.gpt2_checkpoint(folder / "model"), folder, data=folder / "data")


def zipped(folder: Path) -> Arguments:
    plain = builders.text_csv(folder / "plain.csv").read_bytes()
    (folder / "train.csv.gz").write_bytes(gzip.compress(plain, mtime=0))
    return bert_on(folder, folder / "train.csv.gz")


def wrapped(folder: Path) -> Arguments:
    (folder / "train.json").write_text(json.dumps({"version": "1.0", "data": table()}))
    return bert_on(folder, folder / "train.json")


def csv_of(folder: Path, rows: Sequence[dict[str, str]], name: str = "train.csv", encoding: str = "utf-8") -> Path:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return folder / name


def columns(folder: Path, **names: str) -> Arguments:
    return bert_on(folder, csv_of(folder, table(**names)))


def encoded(folder: Path, encoding: str) -> Arguments:
    rows = [{**row, "text": f"{row['text']} café"} for row in table()]
    return bert_on(folder, csv_of(folder, rows, encoding=encoding), "--encoding", encoding)


def digits_as_text(folder: Path) -> Arguments:
    """JSON lines whose labels are "0" and "1"; the names are told by --set label_names."""
    rows = [{**row, "label": str(SHARE[row["label"]])} for row in table()]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return bert_on(folder, folder / "train.jsonl", "--set", "label_names=[neg, pos]")


def picture_column(folder: Path, name: str) -> Arguments:
    """A CSV beside its pictures; the column that names them goes by this name."""
    builders.image_folder(folder / "pictures", splits=[])
    files = sorted((folder / "pictures").rglob("*.png"))
    rows = [{name: file.relative_to(folder).as_posix(), "label": file.parent.name} for file in files]
    return run(builders.timm_checkpoint(folder / "model"), folder, data=csv_of(folder, rows))


def opens(rows: int = 24) -> Check:
    return both(done, counts(all=rows))


PICTURES = ("filename", "filepath", "image_id", "image_path")
CASES = [
    Case("B1", "transformers' timm_wrapper, model_args null", "refused: transformers cannot load it, exit 2", (2, ""),
         timm_wrapper, done),
    Case("B2", "a tokenizer with a token more than the embedding has rows", "refused though no row uses it, exit 2", (2, ""),
         more_tokens_than_rows, both(done, warned("<image>"))),
    Case("B3", "RWKV", "refused: \"the model cannot compute on these data\", exit 2", (2, ""), rwkv, done),
    Case("B4", "a tokenizer that is an spm.model alone", "refused where sentencepiece was not installed, as it was no "
         "dependency, with a word of tiktoken; opened where it was", (0, ""), sentencepiece_alone, a_dependency),
    Case("B5", "folders named by macOS (NFD), class names in NFC", "refused, two lists that look alike, exit 2",
         (2, "no class names"), two_forms_of_one_name, done),
    Case("B6", "a head of 1001 classes, background first, synset folders", "refused: 2 classes against 1001, exit 2",
         (2, "1001"), lambda folder: imagenet_head(folder, 1001, 1), figure("baseline", "accuracy", lambda result: 10 / 16)),
    *(
        Case(f"B{number}", f"a head of {classes} classes, synset folders", before, was,
             lambda folder, classes=classes, subset=subset: imagenet_head(folder, classes, place_of_tench(subset)),
             figure("baseline", "accuracy", lambda result: 10 / 16), already)
        for number, classes, subset, before, was, already in (
            (7, 11221, "imagenet-21k-miil", "refused: 2 classes against 11221, exit 2", (2, "11221"), False),
            (8, 21841, "imagenet-22k", "opened, exit 0", (0, ""), True),
            (9, 21842, "imagenet-22k-ms", "refused: 2 classes against 21842, exit 2", (2, "21842"), False),
        )
    ),
    Case("B10", "100 classes of 4 rows", "refused: \"too few rows for a holdout; give more data\", exit 2", (2, "give more"),
         many_classes_of_few_rows, either(both(done, a_holdout_of_each_class), refused(r"--holdout 0?\.\d"))),
    Case("B11", "POSITIVE and NEGATIVE against neg and pos, --set label_map", "no such field, exit 2", (2, "label_map"),
         lambda folder: other_names(folder, "--set", "label_map={neg: NEGATIVE, pos: POSITIVE}"),
         figure("baseline", "accuracy", lambda result: 15 / 24)),
    Case("B12", "the same with --set label_names", "label_names ignored for a data set with names of its own, exit 2",
         (2, "no class names"), lambda folder: other_names(folder, "--set", "label_names=[NEGATIVE, POSITIVE]"),
         figure("baseline", "accuracy", lambda result: 15 / 24)),
    Case("B13", "the same with neither", "refused: \"rename the labels\", exit 2", (2, "Rename"),
         other_names, refused("neg", "NEGATIVE", "label_map|label_names")),
    Case("B14", "a checkpoint of timm's train.py, with its argparse.Namespace", "refused: wants argparse.Namespace, exit 2",
         (2, "argparse"), saved_by_a_trainer, either(done, refused("Namespace", "save|torch.load|convert|remove"))),
    Case("B15", "a data-set folder of the Hub: data/train-00000-of-00001.parquet", "refused: taken for a folder of classes, "
         "exit 2", (2, "the data has image, label"), hub_folder, counts(trained=24, eval=12)),
    Case("B16", "shards part-00000.jsonl to part-00002.jsonl", "refused: no images in class folders, exit 2",
         (2, "class folders"), shards, opens(36)),
    Case("B17", "a folder of .txt files", "refused: no images in class folders, exit 2", (2, "class folders"),
         folder_of_texts, done),
    Case("B18", "train.csv.gz", "refused: a .gz file, exit 2", (2, r"\.gz"), zipped, opens()),
    Case("B19", "JSON whose rows lie under `data`", "refused, exit 2", (2, ""), wrapped, opens()),
    *(
        Case(f"B{number}", f"pictures named by a column `{name}`", "refused: no image column found, exit 2",
             (2, "no image column"), lambda folder, name=name: picture_column(folder, name), opens())
        for number, name in enumerate(PICTURES, 20)
    ),
    Case("B24", "columns Text and Label", "refused: no label column found, exit 2", (2, "column found"),
         lambda folder: columns(folder, text="Text", label="Label"), opens()),
    Case("B25", "columns text and sentiment", "refused: no label column found, exit 2", (2, "no label column"),
         lambda folder: columns(folder, label="sentiment"), opens()),
    Case("B26", "labels \"0\" and \"1\" as texts, with --set label_names", "opened, exit 0", (0, ""),
         digits_as_text, opens(), already=True),
    *(
        Case(f"B{number}", f"a CSV in {encoding}, --encoding {encoding}", "no such option, exit 2", (2, "No such option"),
             lambda folder, encoding=encoding: encoded(folder, encoding), opens())
        for number, encoding in ((27, "utf-16"), (28, "latin-1"))
    ),
    Case("B29", "a name written with a letter of another alphabet", "refused rightly, two lists that look alike, exit 2",
         (2, "no class names"), alike_but_not_equal, refused(r"\\u0430|U\+0430|CYRILLIC")),
]  # fmt: skip
