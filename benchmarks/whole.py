"""A whole run with its evidence beside the trainings in it: `python benchmarks/whole.py [--quick] [--rounds N]`.

Ours is the public call: refined, dense and random arm, SEEDS seeds each, the holdout at each epoch's end, the evaluation
split, the checks, the written checkpoint, the report. Against it: the same number of trainings and evaluations as one writes
them, without evidence, masks or outputs: each arm and seed trains from the source, over files that are decoded each time, with
the same fused optimizer; the holdout after each epoch of the last phase, the evaluation rows at the end. Both have the same
rows in each part. Pictures: ResNet-18 at 128 px on JPEG files of 512 px, random crops
and flips. Texts: a BERT of 6 layers, tokenized as they are read. Seconds of all, in processes of their own, in turn.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Round, apart, arguments, each_in_a_place, ratio, table, timed, verdict
from made import bert_folder, pictures, text_table, timm_folder
from torch import nn

BATCH, SIZE, LENGTH = 32, 128, 48
ARMS, SEEDS = ("refined", "dense", "random"), 3
CROP = {"crop": "random-resized", "scale": (0.35, 1.0), "ratio": (0.75, 4 / 3), "flip": 0.5}
BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
PARTS = {"train": 288, "validation": 32, "test": 80}  # rows
MOST = {"pictures": 0.9, "texts": 1.0}  # our seconds over the bare loops'
Example = tuple[torch.Tensor, int]
Read = Callable[[Any, bool], Example]  # a row, and whether it is augmented


@contextmanager
def ours(source: Path, data: Path, out: Path, epochs: int, **recipe: Any) -> Iterator[Round]:
    """The whole call; a round is a new output."""
    import dsd_refine

    number = iter(range(1 << 20))

    def run() -> None:
        dsd_refine.refine(
            str(source), data=str(data), output_dir=out / f"out-{next(number)}", control=["dense", "random"], seeds=SEEDS,
            sparse_epochs=epochs, dense_epochs=epochs, lr=1e-3, schedule="constant", batch_size=BATCH, gate="none",
            device="cpu", **recipe,
        )  # fmt: skip

    yield timed(run)


def trainings(build: Callable[[], nn.Module], parts: list[list[Any]], read: Read, epochs: int, adamw: bool) -> None:
    """What one writes by hand: the same trainings and evaluations, one after another."""
    trained, held, judged = parts
    for _ in range(len(ARMS) * SEEDS):
        model = build()
        for phase in range(2):
            optimizer: torch.optim.Optimizer = (
                torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) if adamw
                else torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
            )  # fmt: skip
            for _ in range(epochs):
                train(model, optimizer, trained, read)
                if phase:
                    evaluate(model, held, read)
            if not phase:
                evaluate(model, held, read)
        evaluate(model, judged, read)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[Any], read: Read) -> None:
    model.train()
    order = torch.randperm(len(rows)).tolist()
    for start in range(0, len(order), BATCH):
        x, y = collated([read(rows[number], True) for number in order[start : start + BATCH]])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_of(model, x), y).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, rows: list[Any], read: Read) -> int:
    model.eval()
    right = 0
    for start in range(0, len(rows), BATCH):
        x, y = collated([read(row, False) for row in rows[start : start + BATCH]])
        right += int((logits_of(model, x).argmax(1) == y).sum())
    return right


def collated(examples: list[Example]) -> Example:
    inputs, labels = zip(*examples, strict=True)
    if inputs[0].ndim == 1:
        return nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.tensor(labels)  # type: ignore[return-value]
    stacked = torch.stack(inputs).contiguous(memory_format=torch.channels_last)
    return stacked, torch.tensor(labels)  # type: ignore[return-value]


def logits_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.ndim == 4:
        return model(x)  # type: ignore[no-any-return]
    return model(input_ids=x, attention_mask=(x != 0).long()).logits  # type: ignore[no-any-return]


@contextmanager
def bare_pictures(source: Path, data: Path, epochs: int) -> Iterator[Round]:
    import timm
    from PIL import Image
    from torchvision import transforms as T

    ends = [T.PILToTensor(), T.ConvertImageDtype(torch.float32), T.Normalize(0.5, 0.5)]
    crop = T.RandomResizedCrop(SIZE, CROP["scale"], CROP["ratio"])
    shown = {
        True: T.Compose([crop, T.RandomHorizontalFlip(), *ends]),
        False: T.Compose([T.Resize(SIZE), T.CenterCrop(SIZE), *ends]),
    }

    def read(path: Path, training: bool) -> Example:
        with Image.open(path) as image:
            return shown[training](image.convert("RGB")), int(path.parent.name[1:])

    def build() -> nn.Module:
        return timm.create_model(f"local-dir:{source}", pretrained=True).to(memory_format=torch.channels_last)  # type: ignore[no-any-return]

    parts = [sorted((data / name).rglob("*.jpg")) for name in PARTS]
    yield timed(lambda: trainings(build, parts, read, epochs, adamw=False))


@contextmanager
def bare_texts(source: Path, data: Path, epochs: int) -> Iterator[Round]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)

    def read(row: dict[str, str], training: bool) -> Example:
        ids = tokenizer(row["text"], truncation=True, max_length=LENGTH)["input_ids"]
        return torch.tensor(ids), int(row["label"][1:])

    def build() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(source)  # type: ignore[no-any-return]

    parts = [list(csv.DictReader((data / f"{name}.csv").read_text().splitlines())) for name in PARTS]
    yield timed(lambda: trainings(build, parts, read, epochs, adamw=True))


def shown(kind: str, seconds: dict[str, list[float]]) -> None:
    rows = [[name, f"{min(each):.1f}", ratio(seconds, "ours", name)] for name, each in seconds.items()]
    table(f"{kind}: {len(ARMS)} arms, {SEEDS} seeds", ["", "seconds", "ours / this one"], rows)
    pairs = sorted(mine / other for mine, other in zip(seconds["ours"], seconds["bare"], strict=True))
    verdict("seconds, ours / the bare loops", pairs[len(pairs) // 2], MOST[kind])


def images(given: Any, folder: Path) -> None:
    """ResNet-18 on JPEG files."""
    epochs = 1 if given.quick else 2
    for seed, (name, rows) in enumerate(PARTS.items()):
        pictures(folder / "data" / name, rows // (4 if given.quick else 1), 512, seed=seed)
    source = timm_folder(folder / "model", "resnet18", 10, SIZE)
    ways = {
        "ours": partial(ours, source, folder / "data", folder, epochs, optimizer="sgd", augment=CROP),
        "bare": partial(bare_pictures, source, folder / "data", epochs),
    }
    shown("pictures", apart(ways, given.rounds, warm=0))


def texts(given: Any, folder: Path) -> None:
    """A BERT on a CSV."""
    epochs, data = 1 if given.quick else 2, folder / "data"
    for seed, (name, rows) in enumerate(PARTS.items()):
        text_table(data / f"{name}.csv", rows // (4 if given.quick else 1), LENGTH, seed)
    source = bert_folder(folder / "model", LENGTH, **BERT)
    ways = {
        "ours": partial(ours, source, data, folder, epochs, optimizer="adamw"),
        "bare": partial(bare_texts, source, data, epochs),
    }
    shown("texts", apart(ways, given.rounds, warm=0))


def main() -> None:
    given = arguments(__doc__, 3)
    each_in_a_place(given, images, texts)


if __name__ == "__main__":
    main()
