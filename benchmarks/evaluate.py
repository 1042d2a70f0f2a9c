"""What our evaluation costs: `python benchmarks/evaluate.py [--quick] [--workers N]`.

Per-row scores of ResNet-50 at 128 px on JPEG files and of a BERT of 6 layers on a CSV, batch 32, against a bare loop over our
own DataLoader that counts hits, and for pictures against timm's validation with its own dataset and loader. Rows a second,
each in a process of its own, in turn.

timm's `validate.py` is in neither its wheel nor its source archive: what stands for it is the loop of that script made of
timm's own dataset, loader, accuracy and meters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Round, apart, arguments, each_in_a_place, rates, timed
from made import bert_folder, pictures, text_table, timm_folder
from throughput import BATCH, BERT, LENGTH, SIZE, run_of
from torch import nn

from dsd_refine.training.batches import loader
from dsd_refine.training.evaluate import evaluate


@contextmanager
def ours(*args: Any) -> Iterator[Round]:
    with run_of(*args) as run:
        yield timed(lambda: evaluate(run.loop, run.task.eval))


@contextmanager
def bare(*args: Any) -> Iterator[Round]:
    """The loop that one writes by hand, over our DataLoader."""
    with run_of(*args, plain=True) as run:
        model, part = run.loop.model, run.task.eval
        plan = [([(unit, None) for unit in range(i, min(i + BATCH, part.units))], True) for i in range(0, part.units, BATCH)]

        @torch.no_grad()
        def score() -> None:
            model.eval()
            hits, loss = 0, 0.0
            for batch in loader(run.loop, part, plan):
                inputs = dict(batch.inputs)
                if "x" in inputs:
                    logits = model(inputs["x"].contiguous(memory_format=torch.channels_last))
                else:
                    logits = model(**inputs).logits
                loss += float(nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
                hits += int((logits.argmax(1) == batch.targets).sum())

        yield timed(score)


@contextmanager
def timm_validation(folder: Path, data: Path, workers: int) -> Iterator[Round]:
    """The loop of timm's validate.py for one device: forward, loss, two accuracies, meters."""
    import timm
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.utils import AverageMeter, accuracy

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(memory_format=torch.channels_last)
    config = resolve_data_config({}, model=model, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=str(data)), input_size=config["input_size"], batch_size=BATCH, use_prefetcher=False,
        interpolation=config["interpolation"], mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
        num_workers=workers, pin_memory=False, persistent_workers=False,
    )  # fmt: skip
    loss_of = nn.CrossEntropyLoss()

    @torch.no_grad()
    def score() -> None:
        model.eval()
        losses, first, five, seconds, began = AverageMeter(), AverageMeter(), AverageMeter(), AverageMeter(), time.time()
        for x, y in loader:
            logits = model(x.contiguous(memory_format=torch.channels_last))
            loss = loss_of(logits, y)
            one, fifth = accuracy(logits.detach(), y, topk=(1, 5))
            losses.update(loss.item(), x.size(0))
            first.update(one.item(), x.size(0))
            five.update(fifth.item(), x.size(0))
            seconds.update(time.time() - began)
            began = time.time()

    yield timed(score)


def images(given: Any, folder: Path) -> None:
    rows = (2 if given.quick else 8) * BATCH
    pictures(folder / "data/train", 100, 160)
    pictures(folder / "data/test", rows, 160, seed=1)
    model = timm_folder(folder / "model", "resnet50", 10, SIZE)
    ways = {name: partial(make, model, folder / "data", folder / name, 1, given.workers) for name, make in OURS.items()}
    ways["timm"] = partial(timm_validation, model, folder / "data/test", given.workers)
    peers = {"bare": ("bare loop", 0.98), "timm": ("timm's validation", 1.0)}
    title = f"ResNet-50, {SIZE} px, JPEG files, batch {BATCH}, {rows} rows"
    rates(title, "rows", apart(ways, given.rounds), rows, peers)


def texts(given: Any, folder: Path) -> None:
    rows = (2 if given.quick else 20) * BATCH
    data = text_table(folder / "data/train.csv", 60, LENGTH).parent
    text_table(data / "test.csv", rows, LENGTH, seed=1)
    model = bert_folder(folder / "model", LENGTH, **BERT)
    ways = {name: partial(make, model, data, folder / name, 1, given.workers) for name, make in OURS.items()}
    title = f"BERT 6 x 384, {LENGTH} tokens, CSV, batch {BATCH}, {rows} rows"
    rates(title, "rows", apart(ways, given.rounds), rows, {"bare": ("bare loop", 0.98)})


OURS = {"ours": ours, "bare": bare}


def main() -> None:
    given = arguments(__doc__, 9, workers=(0, "loading processes of everybody"))
    each_in_a_place(given, images, texts)


if __name__ == "__main__":
    sys.exit(main())
