"""Captions of composed pictures, as benchmarks/captions.py makes them, with further pictures for the trials."""

from __future__ import annotations

import shutil
import sys

import transformers
from places import ROOT, Given, Sources

sys.path.insert(0, str(ROOT / "benchmarks"))
import captions
from taught import first_dense

TRIAL_ROWS = 500


def made(sources: Sources) -> Given:
    """The pictures of training and evaluation, and the checkpoint that was trained on the former."""
    place = sources.work / "captions"
    given = Given(place / "vit-gpt2", place / "data/train", place / "data/test")
    if not (place / "trained").exists():
        shutil.rmtree(place, ignore_errors=True)
        captions.draw_all(place / "data")
        captions.untrained(given.checkpoint)
        model = transformers.VisionEncoderDecoderModel.from_pretrained(given.checkpoint)
        recipe = ("image-captioning", captions.EPOCHS, captions.PEAK, captions.BATCH)
        first_dense(given.checkpoint, place / "data", model, *recipe)
        (place / "trained").touch()
    return given


def captions_trial(sources: Sources, fold: int) -> Given:
    """Further pictures judge: those of a split with another number, drawn by other seeds."""
    given, judge = made(sources), sources.work / "captions/trial"
    if not judge.is_dir():
        captions.draw(judge, 2, TRIAL_ROWS)
    return Given(given.checkpoint, given.train, judge)


def captions_final(sources: Sources) -> Given:
    return made(sources)
