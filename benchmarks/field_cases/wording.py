"""Refused rightly, with words that lead nowhere; and what should have been warned of."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import builders
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .common import Arguments, Case, Checked, Result, both, counts, done, either, refused, run, warned


def changed(file: Path, **fields: Any) -> None:
    """Fields of a JSON file, laid over what it holds."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(held | fields))


# ---------------------------------------------------------------- what is no checkpoint of ours


def adapter_alone(folder: Path) -> Arguments:
    model = folder / "model"
    model.mkdir()
    changed(model / "adapter_config.json", peft_type="LORA", base_model_name_or_path="org/base-7b", r=8)
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(8, 4)}, model / "adapter_model.safetensors")
    return run(model, folder, data=builders.text_file(folder / "train.txt"))


def other_format(folder: Path, name: str) -> Arguments:
    model = builders.gpt2_checkpoint(folder / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"GGUF" + bytes(64))
    return run(model, folder, data=builders.text_file(folder / "train.txt"))


def eight_bits(folder: Path) -> Arguments:
    model = builders.bert_checkpoint(folder / "model")
    tensors = load_file(model / "model.safetensors")
    whole = {n: (t * 100).to(torch.int8) if t.ndim == 2 else t for n, t in tensors.items()}
    save_file(whole, model / "model.safetensors", {"format": "pt"})
    return run(model, folder, data=builders.text_csv(folder / "train.csv"))


def config_alone(folder: Path, architecture: str, **fields: Any) -> Arguments:
    """A folder whose config names this class; its weights are one tensor."""
    model = folder / "model"
    model.mkdir()
    changed(model / "config.json", architectures=[architecture], **fields)
    save_file({"shared.weight": torch.ones(4, 4)}, model / "model.safetensors", {"format": "pt"})
    return run(model, folder, data=builders.text_csv(folder / "train.csv"))


def one_output(folder: Path) -> Arguments:
    model = builders.bert_checkpoint(folder / "model", labels=1)
    return run(model, folder, data=builders.text_csv(folder / "train.csv", labels=("0", "1")))


def pointer(folder: Path) -> Arguments:
    model = builders.bert_checkpoint(folder / "model")
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 466062\n"
    (model / "tokenizer.json").write_text(text)
    return run(model, folder, data=builders.text_csv(folder / "train.csv"))


# ---------------------------------------------------------------- data


def semicolons(folder: Path) -> Arguments:
    data = builders.text_csv(folder / "plain.csv")
    (folder / "train.csv").write_text(data.read_text().replace(",", ";"))
    return run(builders.bert_checkpoint(folder / "model"), folder, data=folder / "train.csv")


def utf_16(folder: Path) -> Arguments:
    data = builders.text_csv(folder / "train.csv")
    data.write_text(data.read_text(), encoding="utf-16")
    return run(builders.bert_checkpoint(folder / "model"), folder, data=data)


def pictures_elsewhere(folder: Path) -> Arguments:
    lines = ["image,label", *(f"pictures/{row}.png,{'abc'[row % 3]}" for row in range(12))]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return run(builders.timm_checkpoint(folder / "model"), folder, data=folder / "train.csv")


def a_page_for_a_picture(folder: Path) -> Arguments:
    data = builders.image_folder(folder / "data")
    (data / "train/b/003.png").write_text("<html><body>403 Forbidden</body></html>")
    return run(builders.timm_checkpoint(folder / "model"), folder, data=data)


def said_what_it_is(result: Result) -> Checked:
    rows = result.skipped
    reason = str(rows[0]["reason"]) if rows else "nothing skipped"
    return reason, result.code == 0 and len(rows) == 1 and "file it" not in reason and "picture" in reason


COMMAS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark, man-eater")


def unknown_among_imagenet(folder: Path) -> Arguments:
    """ImageNet's names as transformers' configs have them: several for a class, by comma."""
    model = builders.vit_checkpoint(folder / "model", labels=COMMAS)
    return run(model, folder, data=builders.image_folder(folder / "data", classes=[*COMMAS[:2], "shark"], channels=3))


def names_told_apart(result: Result) -> Checked:
    """Names that hold commas are quoted, or parted by something else."""
    text, signs = result.message, ("'tench, Tinca", '"tench, Tinca', "‘tench, Tinca", "“tench, Tinca", "`tench", ";", " | ")
    return text, result.code == 2 and "shark" in text and any(sign in text for sign in signs)


def a_document_a_line(folder: Path) -> Arguments:
    texts = builders.text_file(folder / "plain.txt").read_text().split("\n\n")
    (folder / "train.txt").write_text("\n".join(texts) + "\n")
    return run(builders.gpt2_checkpoint(folder / "model"), folder, data=folder / "train.txt")


def column_before_model(folder: Path) -> Arguments:
    """A wrong column and, in the weights, a value that shows when they are loaded: what is said was looked at first."""
    model = builders.bert_checkpoint(folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["classifier.bias"] = torch.tensor([float("nan"), 0.0])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return run(model, folder, "--label-column", "sentiment", data=builders.text_csv(folder / "train.csv"))


def turned(folder: Path) -> Arguments:
    data = builders.image_folder(folder / "data", channels=3)
    for file in sorted((data / "test/a").glob("*.png")):
        picture, exif = Image.open(file), Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        picture.save(file, exif=exif)
    return run(builders.timm_checkpoint(folder / "model", in_chans=3), folder, data=data)


def twelve_bits(folder: Path) -> Arguments:
    """Greys of 12 bits in files of 16, as scanners and microscopes write them."""
    data = builders.image_folder(folder / "data")
    for file in data.rglob("*.png"):
        grey = np.asarray(Image.open(file)).astype(np.uint16) * 16
        held = io.BytesIO()
        Image.fromarray(grey).save(held, format="PNG")
        file.write_bytes(held.getvalue())
    return run(builders.timm_checkpoint(folder / "model"), folder, data=data)


# ---------------------------------------------------------------- checkpoints


def three_means(folder: Path) -> Arguments:
    model = builders.timm_checkpoint(folder / "model")
    config = json.loads((model / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (model / "config.json").write_text(json.dumps(config))
    return run(model, folder, data=builders.image_folder(folder / "data"))


def another_grid(folder: Path) -> Arguments:
    """A vision transformer fine-tuned at 64 pixels, whose config still builds it for 32 x 32."""
    model = builders.timm_checkpoint(folder / "model", arch="test_vit", in_chans=3, size=32, img_size=32)
    large = builders.timm_checkpoint(folder / "large", arch="test_vit", in_chans=3, size=64, img_size=64)
    (large / "model.safetensors").rename(model / "model.safetensors")
    return run(model, folder, data=builders.image_folder(folder / "data", channels=3))


def untied(folder: Path) -> Arguments:
    model = builders.gpt2_checkpoint(folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 0.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return run(model, folder, data=builders.text_file(folder / "train.txt"))


T5 = {"model_type": "t5", "vocab_size": 32, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}
WHISPER = {"model_type": "whisper", "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
SEEN = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {"model_type": "paligemma", "vision_config": SEEN, "text_config": {"model_type": "gemma", "vocab_size": 64}}
MARIAN = {"model_type": "marian", "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
NOT_THAT = "image-captioning is for"
OTHER_FORMATS = ("model-q4.gguf", "model.onnx", "flax_model.msgpack", "tf_model.h5")

CASES = [
    Case("C1", "a repository of a LoRA adapter alone", "\"has no config.json, so neither timm's nor transformers' layout\"",
         (2, "no config.json"), adapter_alone, refused("LoRA|adapter", "org/base-7b", "merge")),
    *(
        Case(f"C{number}", f"a folder whose weights are {name} alone", "\"no weights here (looked for model.safetensors …)\"",
             (2, "no weights here"), lambda folder, name=name: other_format(folder, name), refused(name.replace(".", r"\.")))
        for number, name in enumerate(OTHER_FORMATS, 2)
    ),
    Case("C6", "weights of 8 bits", "trained on the bare numbers, then \"the written checkpoint failed its check\", exit 3",
         (3, "failed its check"), eight_bits, refused("int8|I8|8.bit|quanti", never="without its head")),
    *(
        Case(f"C{number}", name, "\"image-captioning is for vision-encoder-decoder, blip, git\"", (2, NOT_THAT),
             lambda folder, given=given: config_alone(folder, given[0], **given[1]),
             refused(words, never=NOT_THAT))
        for number, name, given, words in (
            (7, "T5", ("T5ForConditionalGeneration", T5), "target column"),
            (8, "Whisper", ("WhisperForConditionalGeneration", WHISPER), "audio column"),
            (9, "a Gemma that sees pictures", ("PaliGemmaForConditionalGeneration", GEMMA), "gemma|vision.language|chat"),
        )
    ),
    *(
        Case(f"C{number}", name, "\"which has no task's head\"", (2, "no task's head"),
             lambda folder, given=given: config_alone(folder, given[0], **given[1]),
             refused(words, never="has no task's head"))
        for number, name, given, words in (
            (10, "Marian", ("MarianMTModel", MARIAN), "target column"),
            (11, "a BERT that names entities", ("BertForTokenClassification", BERT), "token"),
            (12, "a BERT that answers questions", ("BertForQuestionAnswering", BERT), "question"),
        )
    ),
    Case("C13", "Wav2Vec2ForPreTraining", "taken for masked-lm, and what then does not fit", (2, "masked-lm"),
         lambda folder: config_alone(folder, "Wav2Vec2ForPreTraining", model_type="wav2vec2"),
         refused("pre-?training", never="masked-lm: ")),
    Case("C14", "an ELECTRA discriminator", "taken for masked-lm, and what then does not fit", (2, "masked-lm"),
         lambda folder: config_alone(folder, "ElectraForPreTraining", model_type="electra"),
         refused("discriminator|pre-?training", never="masked-lm: ")),
    Case("C15", "a head of one output", "\"the model has 0 to 0\"", (2, "0 to 0"), one_output,
         refused("one output|regression|single output|1 output", never="0 to 0")),
    Case("C16", "a tokenizer.json that is a pointer of git LFS", "\"Expecting value: line 1 column 1\"",
         (2, "Expecting|expected"), pointer, refused("LFS", r"tokenizer\.json")),
    Case("C17", "a CSV of semicolons", "\"the data has text;label\"", (2, "text;label"), semicolons,
         either(counts(all=24), refused("semicolon|`;`|';'|\";\""))),
    Case("C18", "a CSV whose pictures lie elsewhere", "\"No such file or directory\", without the place looked in",
         (2, "No such file"), pictures_elsewhere, refused(r"/C18/pictures/\d+\.png|/C18/pictures|/C18\b")),
    Case("C19", "a web page named .png", "skipped: \"cannot identify image file it\"", (0, "image file it"),
         a_page_for_a_picture, said_what_it_is),
    Case("C20", "a name that ImageNet does not have", "the classes joined by commas, though the names hold commas",
         (2, "tench"), unknown_among_imagenet, names_told_apart),
    Case("C21", "a .txt of one document a line", "\"1 left for training\"", (2, "left for training"), a_document_a_line,
         refused("blank line|empty line")),
    Case("C22", "a column that is not there, and a model that takes long", "the model was loaded first, and what is "
         "wrong with its weights said", (2, "not finite"), column_before_model,
         refused("sentiment", "text, label|label_column|--label-column")),
    Case("C23", "three mean values for one channel", "\"the preprocessing … is not usable: output with shape …\"",
         (2, "not usable"), three_means, refused("mean|std", r"\b3\b|three", r"\b1\b|one")),
    Case("C24", "a position table of another grid", "\"a base model without its head?\"",
         (2, "without its head"), another_grid, refused("pos_embed", "img_size", "17|16|64")),
    Case("C25", "a head that differs from the embedding it is tied to", "\"two different tensors: kept as two\", which?",
         (0, "kept as two"), untied, warned(r"lm_head\.weight|lm_head")),
    Case("C26", "pictures that EXIF turns", "turned upright, as timm's own evaluation does not; not counted", (0, ""), turned,
         both(done, warned("EXIF|turned", "8"))),
    Case("C27", "pictures of 12 bits in files of 16", "nearly black, unsaid", (0, ""), twelve_bits,
         both(done, warned("16.bit|black|dark"))),
    Case("C28", "a CSV in UTF-16, without a flag", "\"'utf-8' codec can't decode byte 0xff\"", (2, "codec|decode"), utf_16,
         either(counts(all=24), refused("--encoding", "UTF-?8"))),
]  # fmt: skip
