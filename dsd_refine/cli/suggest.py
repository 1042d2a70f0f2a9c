"""Suggest what to type instead, for names that other tools use and for typing errors."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType

# Options of other tools (timm, transformers' Trainer, accelerate, torchvision, pruning tools) -> ours
ELSEWHERE = {
    "--learning-rate": "--lr",
    "--base-lr": "--lr",
    "--epochs": "--sparse-epochs and --dense-epochs",
    "--num-train-epochs": "--sparse-epochs and --dense-epochs",
    "--num-epochs": "--sparse-epochs and --dense-epochs",
    "--max-steps": "--sparse-steps and --dense-steps",
    "--per-device-train-batch-size": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--per-device-eval-batch-size": "--eval-batch-size",
    "--group-by-length": "--set group_by_length=true",
    "--packing": "--set pack=true",
    "--bs": "--batch-size",
    "-b": "--batch-size",
    "--fp16": "--mixed-precision fp16",
    "--bf16": "--mixed-precision bf16",
    "--amp": "--mixed-precision bf16",
    "--amp-dtype": "--mixed-precision",
    "--precision": "--mixed-precision",
    "--fp32": "--mixed-precision no",
    "--output": "--output-dir",
    "--out": "--output-dir",
    "--save-dir": "--output-dir",
    "--model": "the first argument",
    "--model-name": "the first argument",
    "--model-name-or-path": "the first argument",
    "--checkpoint": "the first argument",
    "--pretrained": "the first argument",
    "-m": "the first argument",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--data-dir": "--data",
    "--data-path": "--data",
    "--train-file": "--data",
    "--train-data": "--data",
    "--train-dir": "--data",
    "--validation-file": "--eval-data",
    "--test-file": "--eval-data",
    "--val-data": "--eval-data",
    "--val-split": "--holdout-split",
    "--test-split": "--eval-split",
    "--dataset-config-name": "--data NAME:CONFIG",
    "--wd": "--weight-decay",
    "--opt": "--optimizer",
    "--optim": "--optimizer",
    "--warmup": "--warmup-steps",
    "--num-warmup-steps": "--warmup-steps",
    "--warmup-epochs": "--warmup-steps",
    "--lr-scheduler": "--schedule",
    "--lr-scheduler-type": "--schedule",
    "--sched": "--schedule",
    "--grad-accum": "--gradient-accumulation-steps",
    "--grad-accum-steps": "--gradient-accumulation-steps",
    "--clip-grad": "--max-grad-norm",
    "--grad-clip": "--max-grad-norm",
    "--resume-from-checkpoint": "--resume",
    "--overwrite-output-dir": "--overwrite",
    "--force": "--overwrite",
    "--pruning-ratio": "--sparsity",
    "--prune-ratio": "--sparsity",
    "--amount": "--sparsity",
    "--sparse": "--sparsity",
    "--gpu": "--device cuda",
    "--cpu": "--device cpu",
    "--no-cuda": "--device cpu",
    "--use-cpu": "--device cpu",
    "--num-workers": "--workers",
    "-j": "--workers",
    "--dataloader-num-workers": "--workers",
    "--torchcompile": "--compile",
    "--torch-compile": "--compile",
    "--max-seq-length": "--max-length",
    "--block-size": "--max-length",
    "--random-seed": "--seed",
    "--image-column-name": "--image-column",
    "--label-column-name": "--label-column",
    "--text-column-name": "--text-column",
    "--audio-column-name": "--audio-column",
    "-y": "--yes",
    "-q": "--quiet",
    "-v": "no flag: progress is shown by default",
    "--verbose": "no flag: progress is shown by default",
    "--config": "--recipe",
    "-c": "--recipe",
    "--revision": "MODEL@REVISION",
}


# words that people may try as a verb -> our verb
OTHER_VERBS = {
    "help": "--help",
    "version": "--version",
    "refine": "run",
    "train": "run",
    "finetune": "run",
    "dry-run": "plan",
    "check": "verify",
    "list": "recipes",
}


def suggestion(name: str, known: Sequence[str], elsewhere: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """Return the message for an unknown option. It says which option to use.

    Args:
        name: The option as it was typed.
        known: The options of the verb.
        elsewhere: The options of the other verbs, by verb.
    """
    plain = name.replace("_", "-")
    if plain in known:
        return f"{name}: use {plain}"
    if plain in ELSEWHERE and _all_known(ELSEWHERE[plain], known):
        return f"{name}: use {ELSEWHERE[plain]}"
    if verbs := [verb for verb, options in elsewhere.items() if plain in options]:
        return f"{name}: an option of {' and '.join(f'`{verb}`' for verb in verbs)}, not of this verb"
    close = nearest(plain, known)
    return f"{name}: did you mean {close}?" if close else f"{name}: no such option; --help lists all"


def _all_known(use: str, known: Sequence[str]) -> bool:
    """Return whether the verb has every option that a suggestion names."""
    return all(word in known for word in use.split() if word.startswith("-"))


def one_dash(args: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the message for a long option that was typed with one dash, such as `-lr`.

    Without this check, click would read `-output-dir=x` as `-o utput-dir=x`. None: there is no such
    option in `args`.
    """
    for arg in takewhile(lambda arg: arg != "--", args):
        name = arg.partition("=")[0]
        if name.startswith("-") and (long := f"-{name.replace('_', '-')}") in known:
            return f"{name}: use {long}"
    return None


def nearest_verb(word: str, verbs: Sequence[str]) -> str | None:
    """Return the verb that a word may mean.

    None: no verb is near, or the word is an option, or a file has this name.
    """
    if word.startswith("-") or os.path.exists(word):
        return None
    return OTHER_VERBS.get(word) or nearest(word, verbs)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is nearest to a misspelled one, or None if none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return close[0] if close else None
