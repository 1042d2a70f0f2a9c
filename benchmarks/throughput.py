"""What our loop costs over a phase with data loading: `python benchmarks/throughput.py [--quick] [--workers N]`.

Pictures: ResNet-18 at 128 px on JPEG files, random crops and flips, batch 32, SGD; against a bare loop over our own DataLoader
and against timm's training. Texts: a BERT of 6 layers, tokenized as they are read, batch 32, AdamW; against a bare loop over
our own DataLoader and against Hugging Face's Trainer. Everybody's optimizer is fused, nobody clips. Samples a second, each in
a process of its own, in turn.

timm's `train.py` is in neither its wheel nor its source archive: what stands for it is the loop of that script made of
timm's own dataset, loader, optimizer, schedule and meters. Trainer is timed from its first step's end: without its set-up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import CLOCK, Round, apart, arguments, each_in_a_place, rates, timed
from made import bert_folder, pictures, text_table, timm_folder
from peers import timm_epoch
from torch import nn

from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.recipe import Recipe
from dsd_refine.run import open as opening
from dsd_refine.run.phase import enter_phase, run_phase
from dsd_refine.run.run import Options, Run
from dsd_refine.training.batches import BatchPlan, loader
from dsd_refine.training.state import Key

BATCH, LENGTH, SIZE = 32, 48, 128
CROP = {"crop": "random-resized", "scale": (0.35, 1.0), "ratio": (0.75, 4 / 3), "flip": 0.5}
BERT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}


@contextmanager
def run_of(folder: Path, data: Path, out: Path, steps: int, workers: int, plain: bool = False, **recipe: Any) -> Iterator[Run]:
    """An open run of the command's own kind: log file, saved state and signals included.

    `plain` where it serves a peer: its data alone, in a process that is as torch leaves it.
    """
    phases = [{"kind": "dense", "steps": steps, "lr": 1e-4, "schedule": "constant"}]
    wanted = Recipe.model_validate({"data": str(data), "phases": phases, "batch_size": BATCH, "holdout": 0.1, **recipe})
    source = find_source(str(folder))
    options = Options(output_dir=out, device="cpu", workers=workers)
    if plain:
        opening.keep_freed_memory = lambda: False
    with opening.opened(source, open_library(source), wanted, options) as run:
        torch.use_deterministic_algorithms(not plain, warn_only=True)
        yield run


@contextmanager
def ours(*args: Any, **recipe: Any) -> Iterator[Round]:
    with run_of(*args, **recipe) as run:
        phases = run.recipe.phases

        def train() -> None:
            run_phase(run, phases[0], replace(enter_phase(run, "refined", 0, 0, phases), last=False))

        yield timed(train)


@contextmanager
def bare(folder: Path, data: Path, out: Path, steps: int, *args: Any, **recipe: Any) -> Iterator[Round]:
    """The loop that one writes by hand, over our DataLoader."""
    with run_of(folder, data, out, steps, *args, plain=True, **recipe) as run:
        model = run.loop.model
        if run.recipe.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)

        def train() -> None:
            model.train()
            for batch in loader(run.loop, run.task.train, BatchPlan(run.loop, Key(0, 0), 0, steps)):
                optimizer.zero_grad()
                inputs = dict(batch.inputs)
                if "x" in inputs:
                    logits = model(inputs["x"].contiguous(memory_format=torch.channels_last))
                else:
                    logits = model(**inputs).logits
                nn.functional.cross_entropy(logits, batch.targets).backward()
                optimizer.step()

        yield timed(train)


@contextmanager
def timm_training(arch: str, data: Path, steps: int, workers: int) -> Iterator[Round]:
    """timm's own dataset, loader and optimizer."""
    import timm
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    model = timm.create_model(arch, num_classes=10).to(memory_format=torch.channels_last)
    dataset = create_dataset("", root=str(data), is_training=True)
    loader = create_loader(
        dataset, input_size=(3, SIZE, SIZE), batch_size=BATCH, is_training=True, use_prefetcher=False, no_aug=False,
        scale=CROP["scale"], ratio=CROP["ratio"], hflip=CROP["flip"], color_jitter=0.0, re_prob=0.0, interpolation="bilinear",
        mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=workers, pin_memory=False, persistent_workers=False,
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="momentum", lr=1e-4, weight_decay=0.0, momentum=0.9, fused=True)

    yield timed(lambda: timm_epoch(model, optimizer, islice(loader, steps)))


@contextmanager
def trainer(folder: Path, data: Path, out: Path, steps: int, workers: int, **recipe: Any) -> Iterator[Round]:
    """Hugging Face's Trainer over the same rows, tokenized by its collator: from its first step's end, and so one step more."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    with run_of(folder, data, out, steps, workers, plain=True, **recipe) as run:
        part, task, tokenizer = run.task.train, run.task, AutoTokenizer.from_pretrained(folder)
        ends: list[float] = []

        class Rows(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return part.units

            def __getitem__(self, unit: int) -> dict[str, Any]:
                return {"text": part.rows.table.rows[int(part.rows.numbers[unit])]["text"], "label": int(part.ids[unit])}

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            texts = [row["text"] for row in rows]
            found = tokenizer(texts, padding=True, truncation=True, max_length=task.max_length, return_tensors="pt")
            return {**found, "labels": torch.tensor([row["label"] for row in rows])}

        class Ends(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(CLOCK[-1]())

        arguments = TrainingArguments(
            output_dir=str(out), per_device_train_batch_size=BATCH, max_steps=steps + 1, learning_rate=1e-4, max_grad_norm=0.0,
            lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            dataloader_num_workers=workers, dataloader_pin_memory=False, remove_unused_columns=False, logging_strategy="no",
        )  # fmt: skip
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        made = Trainer(model=model, args=arguments, train_dataset=Rows(), data_collator=collate, callbacks=[Ends()])
        made.remove_callback(PrinterCallback)  # it prints among the figures

        def train() -> float:
            ends.clear()
            timed(made.train)()
            return ends[-1] - ends[0]

        yield train


def images(given: Any, folder: Path) -> None:
    """ResNet-18 on JPEG files."""
    steps = 2 if given.quick else 8
    pictures(folder / "data/train", (steps + 2) * BATCH * 10 // 9, 160)
    pictures(folder / "data/test", 40, 160, seed=1)
    model = timm_folder(folder / "model", given.arch, 10, SIZE)
    run = (steps, given.workers)
    ways = {
        "ours": partial(ours, model, folder / "data", folder / "ours", *run, augment=CROP),
        "bare": partial(bare, model, folder / "data", folder / "bare", *run, augment=CROP),
        "timm": partial(timm_training, given.arch, folder / "data/train", *run),
    }
    peers = {"bare": ("bare loop", 0.98), "timm": ("timm's training", 1.0)}
    title = f"{given.arch}, {SIZE} px, batch {BATCH}, JPEG files"
    rates(title, "samples", apart(ways, given.rounds), steps * BATCH, peers)


def texts(given: Any, folder: Path) -> None:
    """A BERT on a CSV."""
    steps = 2 if given.quick else 10
    data = text_table(folder / "train.csv", (steps + 3) * BATCH * 100 // 70, LENGTH)
    model = bert_folder(folder / "model", LENGTH, **BERT)
    makes = {"ours": ours, "bare": bare, "trainer": trainer}
    ways = {
        name: partial(make, model, data, folder / name, steps, given.workers, optimizer="adamw") for name, make in makes.items()
    }
    peers = {"bare": ("bare loop", 0.98), "trainer": ("Trainer", 1.05)}
    title = f"BERT 6 x 384, {LENGTH} tokens, batch {BATCH}, CSV"
    rates(title, "samples", apart(ways, given.rounds), steps * BATCH, peers)


def main() -> None:
    given = arguments(__doc__, 9, workers=(0, "loading processes of everybody"), arch=("resnet18", "the picture model"))
    each_in_a_place(given, images, texts)


if __name__ == "__main__":
    sys.exit(main())
