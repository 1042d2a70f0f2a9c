"""Conversations about digits: `python benchmarks/conversations_with_pictures.py OUT` (some minutes on one core).

A picture has three of scikit-learn's digits in nine cells. A conversation asks which they are, and where one of them is. A
small Idefics3 (ViT and Llama) is taught on such conversations as the first Dense phase, with its vision encoder. It is then
refined by the default command, and with a rate for so small a model, each beside a control of the same budget. The rows that
evaluate have other digits. Prints the loss of the answers' tokens for benchmarks/results/conversations_with_pictures.txt.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from taught import first_dense, refine
from tokenizers import Tokenizer, models, pre_tokenizers

ROWS, EPOCHS, PEAK, BATCH = {"train": 1000, "test": 500}, 20, 2e-3, 16
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
WHICH, WHERE = "which digits are here", "where is the {}"
PICTURE_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' }}{% for part in m.content %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
COMMON = ("--control", "dense", "--gate", "none", "--quiet", "--overwrite")
RUNS = {
    "default": COMMON,
    "rate": (*COMMON, "--sparse-epochs", "3", "--dense-epochs", "2", "--batch-size", str(BATCH), "--lr", "5e-4",
             "--warmup-steps", "10"),
}  # fmt: skip


def said(role: str, text: str, *parts: dict[str, str]) -> dict[str, Any]:
    """A message: parts, then a text."""
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def draw_all(folder: Path) -> None:
    """`folder/SPLIT.jsonl` and the pictures in `folder/pictures`. A digit stands in one split alone."""
    images, labels = load_digits(return_X_y=True)
    halves = np.array_split(np.random.default_rng(0).permutation(len(images)), 2)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number, (split, of_split) in enumerate(zip(ROWS, halves, strict=True)):
        draw, lines = np.random.default_rng([1, number]), []
        for row in range(ROWS[split]):
            chosen, cells = draw.choice(of_split, 3, replace=False), sorted(draw.choice(9, 3, replace=False).tolist())
            picture = np.zeros((24, 24))
            for digit, cell in zip(chosen, cells, strict=True):
                top, left = 8 * (cell // 3), 8 * (cell % 3)
                picture[top : top + 8, left : left + 8] = images[digit].reshape(8, 8)
            name = f"pictures/{split}-{row:04}.png"
            Image.fromarray((picture * 15.9).astype(np.uint8)).save(folder / name)
            digits = [NAMES[labels[digit]] for digit in chosen]
            asked = int(draw.integers(0, 3))
            first = digits.index(digits[asked])  # of two equal digits the first is meant
            messages = [
                said("user", WHICH, {"type": "image", "path": name}), said("assistant", " ".join(digits)),
                said("user", WHERE.format(digits[asked])), said("assistant", CELLS[cells[first]]),
            ]  # fmt: skip
            lines.append(json.dumps({"messages": messages}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def untrained(folder: Path) -> Any:
    """A small Idefics3, which sees a picture as nine patches, each a cell; words are tokens."""
    words = sorted({*NAMES, *" ".join((*CELLS, WHICH, WHERE)).split(), "user", "assistant"} - {"{}"})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words, *PICTURE_TOKENS])}
    made = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="<end_of_utterance>", unk_token="<unk>",
        additional_special_tokens=PICTURE_TOKENS, model_max_length=64,
    )  # fmt: skip
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 24}, max_image_size={"longest_edge": 24}, do_image_splitting=False,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    transformers.Idefics3Processor(images, tokenizer, image_seq_len=9, chat_template=TEMPLATE).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    text = {**sizes, "model_type": "llama", "num_key_value_heads": 4, "vocab_size": len(vocabulary), "pad_token_id": 0,
            "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": vocabulary["<end_of_utterance>"]}  # fmt: skip
    config = transformers.Idefics3Config(
        text_config=text, vision_config={**sizes, "image_size": 24, "patch_size": 8}, scale_factor=1,
        image_token_id=vocabulary["<image>"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Idefics3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model


def main() -> None:
    out, started = Path(sys.argv[1]).resolve(), time.time()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    draw_all(out / "data")
    model = untrained(out / "idefics3")
    first_dense(out / "idefics3", out / "data", model, "image-text-to-text", EPOCHS, PEAK, BATCH)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    size = sum(parameter.numel() for parameter in model.parameters())
    taught = time.time() - started
    print(f"{ROWS['train']:,} + {ROWS['test']:,} conversations, {size:,} parameters; first Dense in {taught:.0f} s\n")
    for name, options in RUNS.items():
        refine(out, "idefics3", name, options)
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
