"""Captions of composed pictures: `python benchmarks/captions.py OUT` (about ten minutes on one core).

A script composes pictures of two shapes and says what is in them: colours, sizes, shapes and where one is of the other. A small
VisionEncoderDecoder (ViT and GPT-2) is trained on them as the first Dense phase, then refined with its encoder frozen, as the
paper did with NeuralTalk, at 80 % and at 50 % sparsity, beside a control. Prints BLEU before and after for
benchmarks/results/captions.txt.
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
from PIL import Image, ImageDraw
from taught import first_dense, refine
from tokenizers import Tokenizer, models, pre_tokenizers

SIZE, ROWS = 48, {"train": 2000, "test": 1000}
COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 190, 70),
    "blue": (60, 80, 230),
    "yellow": (225, 210, 60),
    "white": (235, 235, 235),
}
SHAPES, SIZES = ("square", "circle", "triangle", "cross"), {"small": 9, "large": 17}
SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
EPOCHS, PEAK, BATCH = 10, 1e-3, 32
RUNS = {"80 %": "0.8", "50 %": "0.5"}
DEFAULT = ("--control", "dense", "--gate", "none", "--quiet", "--overwrite")
OPTIONS = (
    "--recipe", "captioning", "--sparse-epochs", "4", "--dense-epochs", "2", "--lr", "5e-4", "--schedule", "cosine",
    "--batch-size", str(BATCH), *DEFAULT,
)  # fmt: skip


def compose(row: int, split: int) -> tuple[Image.Image, list[str]]:
    """A picture and two ways to say it: what is where of what, and what there is."""
    draw = np.random.default_rng([split, row])
    noise = draw.integers(0, 50, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    side = str(draw.choice(list(SIDES)))
    x, y = SIDES[side]
    names = []
    for sign in (1, -1):
        size, colour, shape = (str(draw.choice(list(choice))) for choice in (SIZES, COLOURS, SHAPES))
        centre = [SIZE // 2 + sign * 12 * way + int(draw.integers(-3, 4)) for way in (x, y)]
        paint(ImageDraw.Draw(picture), shape, centre, SIZES[size] / 2, COLOURS[colour])
        names.append(f"{size} {colour} {shape}")
    return picture, [f"a {names[0]} is {side} a {names[1]}", f"there are a {names[0]} and a {names[1]}"]


def paint(canvas: Any, shape: str, centre: list[int], half: float, colour: tuple[int, int, int]) -> None:
    """One shape, `half` its height."""
    x, y = centre
    box = (x - half, y - half, x + half, y + half)
    if shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
    else:
        canvas.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill=colour)
        canvas.rectangle((x - half / 3, y - half, x + half / 3, y + half), fill=colour)


def draw_all(folder: Path) -> None:
    """Draw both splits."""
    for number, (split, rows) in enumerate(ROWS.items()):
        draw(folder / split, number, rows)


def draw(folder: Path, number: int, rows: int) -> None:
    """`folder/metadata.jsonl` and the pictures of the split with this number."""
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    for row in range(rows):
        picture, captions = compose(row, number)
        picture.save(folder / f"{row:04}.png")
        said.append(captions)
    lines = [json.dumps({"file_name": f"{row:04}.png", "text": captions}) for row, captions in enumerate(said)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def untrained(folder: Path) -> None:
    """A small ViT and a small GPT-2 with cross-attention; words are tokens."""
    words = sorted({*SIZES, *COLOURS, *SHAPES, *" ".join(SIDES).split(), "a", "is", "there", "are", "and"})
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    vision = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=SIZE, patch_size=6
    )
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=64,
        n_layer=3,
        n_head=4,
        is_decoder=True,
        add_cross_attention=True,
        **ids,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    torch.manual_seed(0)
    halves = [0.5] * 3
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=halves, image_std=halves)
    for part in (transformers.VisionEncoderDecoderModel(config), processor, tokenizer):
        part.save_pretrained(folder)


def main() -> None:
    out, started = Path(sys.argv[1]).resolve(), time.time()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    draw_all(out / "data")
    untrained(out / "vit-gpt2")
    model = transformers.VisionEncoderDecoderModel.from_pretrained(out / "vit-gpt2")
    first_dense(out / "vit-gpt2", out / "data", model, "image-captioning", EPOCHS, PEAK, BATCH)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sacrebleu"))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"{ROWS['train']} + {ROWS['test']} pictures; drawn and first Dense trained in {time.time() - started:.0f} s\n")
    refine(out, "vit-gpt2", "default", DEFAULT)
    for name, sparsity in RUNS.items():
        print(name)
        refine(out, "vit-gpt2", f"refined-{sparsity}", (*OPTIONS, "--sparsity", sparsity))
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
