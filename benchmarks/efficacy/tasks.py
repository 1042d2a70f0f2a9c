"""The tasks of the search: how each is trained, around which rate and length, and what its runs get.

A released checkpoint knows the rows that it was trained on (digits5k: 100 % of them right, and 97.8 % of others). A holdout of
such rows would measure memory. So trials are judged by rows that the checkpoint does not know, and that are no evaluation rows:
of the made tasks a third part; of tweets training rows that its checkpoint left out; of the image tasks a third of the
training rows, where a stand-in takes the checkpoint's place that was trained in the same way on the other two thirds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import captioner
import cells
import digits
import smollm
import texts
from places import Given, Sources

IMAGES = {
    "task": "image-classification", "optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 64,
}  # fmt: skip
TOKENS = {"optimizer": "adamw", "weight_decay": 0.01, "batch_size": 16, "max_grad_norm": 1.0}


@dataclass(frozen=True)
class EfficacyTask:
    """A task of the search.

    Attributes:
        recipe: The fields of the recipe that all settings share.
        rate: The rate around which the search looks.
        length: The length of a run in epochs.
        trial: Makes what a trial gets, for a fold from 0 to FOLDS - 1.
        final: What the final comparison gets.
        average: How weights are averaged: `swa` over epochs, `ema` over steps where there is hardly an epoch.
        images: Whether images are trained on that augmentation leaves what they are.
    """

    recipe: dict[str, Any]
    rate: float
    length: float
    trial: Callable[[Sources, int], Given]
    final: Callable[[Sources], Given]
    average: str = "swa"
    images: bool = False


CELLS = IMAGES | {"weight_decay": 1e-4}
SMOLLM = TOKENS | {"task": "causal-lm", "max_length": 256, "batch_size": 8}
TWEETS = TOKENS | {"task": "text-classification", "batch_size": 32, "max_length": 48}
LANGUAGE = TOKENS | {"task": "causal-lm", "max_length": 128}
CAPTIONS = TOKENS | {"task": "image-captioning", "batch_size": 32}

TASKS = {
    "demo": EfficacyTask(IMAGES, 0.04, 12, digits.demo_trial, digits.demo_final, images=True),
    "digits5k": EfficacyTask(IMAGES, 0.1, 8, digits.digits5k_trial, digits.digits5k_final, images=True),
    "elpv": EfficacyTask(CELLS, 0.02, 8, cells.elpv_trial, cells.elpv_final, images=True),
    "tweets": EfficacyTask(TWEETS, 2e-5, 2, texts.tweets_trial, texts.tweets_final),
    "smollm": EfficacyTask(SMOLLM, 5e-5, 4, smollm.smollm_trial, smollm.smollm_final),
    "language": EfficacyTask(LANGUAGE, 1e-3, 2, texts.language_trial, texts.language_final),
    "captions": EfficacyTask(CAPTIONS, 5e-4, 6, captioner.captions_trial, captioner.captions_final),
}
