"""What to type instead: names that people know from other tools, and slips of the finger."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# timm's train.py, transformers' Trainer, accelerate, torchvision's references, pruning tools
ELSEWHERE = {
    "--learning-rate": "--lr",
    "--base-lr": "--lr",
    "--epochs": "--sparse-epochs and --dense-epochs",
    "--num-train-epochs": "--sparse-epochs and --dense-epochs",
    "--num-epochs": "--sparse-epochs and --dense-epochs",
    "--max-steps": "--sparse-steps and --dense-steps",
    "--per-device-train-batch-size": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--per-device-eval-batch-size": "--batch-size",
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
    "--model": "MODEL, the first argument",
    "--model-name": "MODEL, the first argument",
    "--model-name-or-path": "MODEL, the first argument",
    "--checkpoint": "MODEL, the first argument",
    "--pretrained": "MODEL, the first argument",
    "-m": "MODEL, the first argument",
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
    "-v": "nothing: it speaks as it is (--quiet is less)",
    "--verbose": "nothing: it speaks as it is (--quiet is less)",
    "--config": "--recipe",
    "-c": "--recipe",
    "--revision": "MODEL@REVISION",
}


def suggestion(name: str, known: Sequence[str]) -> str:
    """What to say of an option that there is none of: the one to use first."""
    plain = name.replace("_", "-")
    if plain in known:
        return f"{name}: use {plain}"
    if plain in ELSEWHERE:
        return f"{name}: use {ELSEWHERE[plain]}"
    close = nearest(plain, known)
    return f"{name}: did you mean {close}?" if close else f"{name}: no such option; --help lists all"


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name that a slip of the finger may have meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return close[0] if close else None
