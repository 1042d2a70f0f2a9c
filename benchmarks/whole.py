"""A whole run with its evidence beside the trainings in it: `python benchmarks/whole.py [--quick] [--rounds N]`.

Ours is the public call: refined, dense and random arm, SEEDS seeds each, the holdout at each epoch's end, the evaluation
split, the checks, the written checkpoint, the report. Against it: the same number of trainings and evaluations as one writes
them, without evidence, masks or outputs: each arm and seed trains from the source, over rows that are decoded or tokenized
each time, with the same fused optimizer; the holdout after each epoch of the last phase, the evaluation rows at the end. They
share nothing, so one of them is timed and counted as often as there are arms and seeds. All have the same rows in each part.
Pictures: ResNet-18 at 128 px on JPEG files of 512 px, random crops and flips, beside a bare loop and timm's training (the loop
of its train.py, which is in neither its wheel nor its source archive), two epochs a phase. Texts: a BERT of 6 layers, tokenized
as they are read, beside a bare loop and Trainer, one epoch a phase; nobody clips the gradient. Seconds of all, in processes of
their own, in turn; the bare loop twice, which shows the noise, and once more over pictures that were decoded before, which is
what remains if reading costs nothing. Of ours also the memory at the ends of the first and the last training of the first
call, and after the last call, above that at the beginning.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Round, anonymous, apart, arguments, each_in_a_place, middle, ratio, table, timed, verdict
from made import bert_folder, pictures, text_table, timm_folder
from peers import timm_epoch
from torch import nn

from dsd_refine.training.hooks import Hooks, Place

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

    number, held = iter(range(1 << 20)), Held()

    def run() -> None:
        first = not held
        held.extend([anonymous()] if first else [])
        dsd_refine.refine(
            str(source), data=str(data), output_dir=out / f"out-{next(number)}", control=["dense", "random"], seeds=SEEDS,
            sparse_epochs=epochs, dense_epochs=epochs, lr=1e-3, schedule="constant", batch_size=BATCH, gate="none",
            device="cpu", callbacks=[held] if first else [], **recipe,
        )  # fmt: skip

    yield timed(run)
    early, late, end = (f"{(value - held[0]) / 1e6:.0f}" for value in (held[2], held[-1], anonymous()))
    calls = next(number)
    print(f"memory of ours, MB: {early} after the first training, {late} after the last of {len(held) // 2}", end=", ")
    print(f"{end} after {calls} calls", flush=True)


class Held(Hooks, list[int]):
    """Bytes of memory at the ends of phases."""

    def on_phase_end(self, place: Place) -> None:
        self.append(anonymous())


def counted(training: Callable[[], None]) -> Round:
    """One training and its evaluations, as often as ours has them."""
    once = timed(training)
    return lambda: once() * len(ARMS) * SEEDS


def by_hand(build: Callable[[], nn.Module], parts: list[list[Any]], read: Read, epochs: int, adamw: bool) -> None:
    """What one writes by hand: a training of two phases and its evaluations."""
    trained, held, judged = parts
    model = build()
    for phase in range(2):
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) if adamw
            else torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        )  # fmt: skip
        for epoch in range(epochs):
            train(model, optimizer, trained, read)
            if phase or epoch == epochs - 1:
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
def bare_pictures(source: Path, data: Path, epochs: int, decoded: bool = False) -> Iterator[Round]:
    """The bare loop. `decoded`: over tensors that were made before, the same in each epoch, which nothing can undercut."""
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

    parts: list[list[Any]] = [sorted((data / name).rglob("*.jpg")) for name in PARTS]
    if decoded:
        parts = [[read(path, False) for path in part] for part in parts]
    yield counted(lambda: by_hand(build, parts, (lambda row, _: row) if decoded else read, epochs, adamw=False))


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
    yield counted(lambda: by_hand(build, parts, read, epochs, adamw=True))


@contextmanager
def timm_pictures(source: Path, data: Path, epochs: int) -> Iterator[Round]:
    """timm's own dataset, loader, optimizer, schedule, meters and accuracy."""
    import timm
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter, accuracy

    def rows(name: str) -> Any:
        training = name == "train"
        return create_loader(
            create_dataset("", root=str(data / name), is_training=training), input_size=(3, SIZE, SIZE), batch_size=BATCH,
            is_training=training, use_prefetcher=False, scale=CROP["scale"], ratio=CROP["ratio"], hflip=CROP["flip"],
            color_jitter=0.0, re_prob=0.0, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0,
            num_workers=0, pin_memory=False, persistent_workers=False,
        )  # fmt: skip

    trained, held, judged = (rows(name) for name in PARTS)
    loss_of = nn.CrossEntropyLoss()

    @torch.no_grad()
    def validate(model: nn.Module, loader: Any) -> None:
        model.eval()
        losses, first = AverageMeter(), AverageMeter()
        for x, y in loader:
            logits = model(x.contiguous(memory_format=torch.channels_last))
            losses.update(loss_of(logits, y).item(), x.size(0))
            first.update(accuracy(logits, y)[0].item(), x.size(0))

    def training() -> None:
        model = timm.create_model(f"local-dir:{source}", pretrained=True).to(memory_format=torch.channels_last)
        for phase in range(2):
            optimizer = create_optimizer_v2(model, opt="momentum", lr=1e-3, weight_decay=0.0, momentum=0.9, fused=True)
            for epoch in range(epochs):
                timm_epoch(model, optimizer, trained)
                if phase or epoch == epochs - 1:
                    validate(model, held)
        validate(model, judged)

    yield counted(training)


@contextmanager
def trainer_texts(source: Path, data: Path, out: Path, epochs: int) -> Iterator[Round]:
    """Hugging Face's Trainer, its collator tokenizing; it evaluates after each epoch, in the first phase as well."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(source)
    parts = [list(csv.DictReader((data / f"{name}.csv").read_text().splitlines())) for name in PARTS]

    def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        texts = [row["text"] for row in rows]
        found = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {**found, "labels": torch.tensor([int(row["label"][1:]) for row in rows])}

    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, num_train_epochs=epochs,
        learning_rate=1e-3, weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no",
        eval_strategy="epoch", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip

    def training() -> None:
        model = AutoModelForSequenceClassification.from_pretrained(source)
        for _ in range(2):
            made = Trainer(model=model, args=arguments, train_dataset=parts[0], eval_dataset=parts[1], data_collator=collate)
            made.remove_callback(PrinterCallback)  # it prints among the figures
            made.train()
        made.predict(parts[2])

    yield counted(training)


def shown(kind: str, seconds: dict[str, list[float]]) -> None:
    rows = [
        [name, f"{median(each):.1f}", ratio(seconds, "ours", name), ratio(seconds, name, "bare loop")]
        for name, each in seconds.items()
    ]
    heads = ["", "seconds", "ours / this one", "this one / the bare loop"]
    table(f"{kind}: {len(ARMS)} arms, {SEEDS} seeds, {len(seconds['ours'])} rounds", heads, rows)
    verdict("seconds, ours / the bare loop", middle(seconds, "ours", "bare loop"), MOST[kind])
    if "bare loop, all decoded before" in seconds:
        limit = middle(seconds, "bare loop, all decoded before", "bare loop")
        print(f"  the limit: forward and backward of the same trainings and evaluations alone, {limit:.3f}")


def images(given: Any, folder: Path) -> None:
    """ResNet-18 on JPEG files."""
    epochs = 1 if given.quick else 2
    for seed, (name, rows) in enumerate(PARTS.items()):
        pictures(folder / "data" / name, rows // (4 if given.quick else 1), 512, seed=seed)
    source = timm_folder(folder / "model", "resnet18", 10, SIZE)
    ways = {
        "ours": partial(ours, source, folder / "data", folder, epochs, optimizer="sgd", augment=CROP),
        "bare loop": partial(bare_pictures, source, folder / "data", epochs),
        "bare loop again": partial(bare_pictures, source, folder / "data", epochs),
        "bare loop, all decoded before": partial(bare_pictures, source, folder / "data", epochs, decoded=True),
        "timm": partial(timm_pictures, source, folder / "data", epochs),
    }
    shown("pictures", apart(ways, given.rounds, warm=0))


def texts(given: Any, folder: Path) -> None:
    """A BERT on a CSV."""
    epochs, data = 1, folder / "data"
    for seed, (name, rows) in enumerate(PARTS.items()):
        text_table(data / f"{name}.csv", rows // (4 if given.quick else 1), LENGTH, seed)
    source = bert_folder(folder / "model", LENGTH, **BERT)
    ways = {
        "ours": partial(ours, source, data, folder, epochs, optimizer="adamw", sets="max_grad_norm=null"),
        "bare loop": partial(bare_texts, source, data, epochs),
        "bare loop again": partial(bare_texts, source, data, epochs),
        "Trainer": partial(trainer_texts, source, data, folder / "trainer", epochs),
    }
    shown("texts", apart(ways, given.rounds, warm=0))


def main() -> None:
    given = arguments(__doc__, 7)
    each_in_a_place(given, images, texts)


if __name__ == "__main__":
    main()
