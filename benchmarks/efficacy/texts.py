"""Texts: tweets with their released classifier, and a language model of Python's documentation that is made here."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from places import ROOT, Given, Sources, fold_of, needed

sys.path.insert(0, str(ROOT / "benchmarks"))
import language

TWEETS_KNOWN, TWEETS_JUDGE = 12_000, 2_000
PARTS = 5  # of the documentation: three train, one judges trials, one is for the final comparison


def tweets_trial(sources: Sources, fold: int) -> Given:
    """The released checkpoint; of the training rows that it was not trained on, 2,000 judge (the same in every fold)."""
    released, data = needed(sources.released, "--released") / "tweets", needed(sources.data, "--realdata") / "tweets"
    place = sources.work / "tweets"
    given = Given(released, place / "train.csv", place / "judge.csv")
    if not given.judge.is_file():
        place.mkdir(parents=True, exist_ok=True)
        with (data / "train.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        # The released checkpoint was trained on the first 12,000 of this order.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        known = {rows[number]["text"] for number in order[:TWEETS_KNOWN]}
        judge = [row for row in (rows[number] for number in order[TWEETS_KNOWN:]) if row["text"] not in known][:TWEETS_JUDGE]
        judged = {row["text"] for row in judge}
        for path, part in ((given.train, [row for row in rows if row["text"] not in judged]), (given.judge, judge)):
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(part)
    return given


def tweets_final(sources: Sources) -> Given:
    data = needed(sources.data, "--realdata") / "tweets"
    return Given(needed(sources.released, "--released") / "tweets", data / "train.csv", data / "test.csv")


def language_part(sources: Sources, judge: str) -> Given:
    """A small GPT-2 of Python's documentation (the topics of pydoc), trained on three fifths of its paragraphs."""
    place = sources.work / "language"
    given = Given(place / "gpt2", place / "train.txt", place / f"{judge}.txt")
    if not given.checkpoint.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        language.first_dense(write_documentation(place), given.checkpoint)
    return given


def write_documentation(place: Path) -> list[str]:
    """Write train.txt, trial.txt and final.txt with the paragraphs of Python's documentation; return those that train."""
    found = dict.fromkeys(" ".join(part.split()) for text in topics.values() for part in text.split("\n\n"))
    parts = [part for part in found if len(part) >= 80]
    numbers = [fold_of(part.encode(), PARTS) for part in parts]
    divided: dict[str, Sequence[int]] = {"train": range(3), "trial": (3,), "final": (4,)}
    rows = {name: [part for part, n in zip(parts, numbers, strict=True) if n in wanted] for name, wanted in divided.items()}
    for name, chosen in rows.items():
        (place / f"{name}.txt").write_text("\n\n".join(chosen), encoding="utf-8")
    return rows["train"]


def language_trial(sources: Sources, fold: int) -> Given:
    return language_part(sources, "trial")


def language_final(sources: Sources) -> Given:
    return language_part(sources, "final")
