"""Handwritten digits: the demo (scikit-learn's) and digits5k, small ResNets both."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from places import ROOT, Given, Sources, copy_pictures, fold_of, needed
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "recipes/demo"))
import make_demo


def demo_trial(sources: Sources, fold: int) -> Given:
    """The demo's training rows but one third, and a checkpoint made of them as the demo's was made of all."""
    place = sources.work / f"demo/{fold}"
    given = Given(place / "checkpoint", place / "train.parquet", place / "judge.parquet")
    if not given.checkpoint.is_dir():
        rows, _ = make_demo.make_datasets()
        folds = np.array([fold_of(image.tobytes()) for image in rows["image"]])
        train, judge = (rows.select(np.flatnonzero(chosen)) for chosen in (folds != fold, folds == fold))
        place.mkdir(parents=True, exist_ok=True)
        train.to_parquet(given.train)
        judge.to_parquet(given.judge)
        model = make_demo.train_model(train, epochs=5)  # as many steps as the demo's three epochs
        names = {"label_names": make_demo.NAMES}
        save_for_hf(model, str(given.checkpoint), model_config=names, model_args={"in_chans": 1}, safe_serialization=True)
    return given


def demo_final(sources: Sources) -> Given:
    demo = ROOT / "recipes/demo"
    return Given(demo / "checkpoint", demo / "train.parquet", demo / "test.parquet")


def digits5k_trial(sources: Sources, fold: int) -> Given:
    """digits5k's training pictures but one third, and a checkpoint made of them as the released one was made of all."""
    place = sources.work / f"digits5k/{fold}"
    given = Given(place / "checkpoint", place / "train", place / "judge")
    if not given.checkpoint.is_dir():
        copy_pictures(needed(sources.data, "--realdata") / "digits5k/train", given, fold)
        teach_digits(needed(sources.released, "--released") / "digits5k", given)
    return given


def teach_digits(released: Path, given: Given) -> None:
    """Train a digits5k network anew: SGD with Nesterov's momentum, 20 epochs, 0.05 falling along a cosine."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    pictures = sorted(given.train.rglob("*.png"))
    pixels = [np.asarray(Image.open(file).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) for file in pictures]
    inputs = (torch.tensor(np.stack(pixels))[:, None] / 255 - 0.1307) / 0.3081
    targets = torch.tensor([int(file.parent.name) for file in pictures])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20 * (len(targets) // 64), pct_start=0.03,
                                                   cycle_momentum=False)  # fmt: skip
    for _ in range(20):
        for batch in torch.randperm(len(targets))[: len(targets) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
            schedule.step()
    write_over(released, model, given.checkpoint)


def write_over(released: Path, model: nn.Module, folder: Path) -> None:
    """Write a checkpoint with the config of a released one."""
    folder.mkdir(parents=True)
    shutil.copy(released / "config.json", folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def digits5k_final(sources: Sources) -> Given:
    data = needed(sources.data, "--realdata") / "digits5k"
    return Given(needed(sources.released, "--released") / "digits5k", data / "train", data / "test")
