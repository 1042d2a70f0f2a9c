"""elpv: photographs of solar cells, and an EfficientNet-Lite0 of ImageNet that was fine-tuned on them."""

from __future__ import annotations

import math

import numpy as np
import timm
import torch
from digits import write_over
from PIL import Image
from places import Given, Sources, copy_pictures, needed
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPOCHS, RATE, BATCH, WARMUP, SIZE = 12, 0.01, 32, 20, 96
NAMES = ("defective", "functional")


def elpv_trial(sources: Sources, fold: int) -> Given:
    """elpv's training pictures but one third, and a checkpoint made of them as the released one was made of all."""
    place = sources.work / f"elpv/{fold}"
    given = Given(place / "checkpoint", place / "train", place / "judge")
    if not given.checkpoint.is_dir():
        copy_pictures(needed(sources.data, "--realdata") / "elpv/train", given, fold)
        teach_cells(sources, given)
    return given


def teach_cells(sources: Sources, given: Given) -> None:
    """Fine-tune the ImageNet weights: SGD with Nesterov's momentum, flips, 12 epochs, 0.01 falling along a cosine."""
    torch.manual_seed(0)
    weights = needed(sources.data, "--realdata") / "checkpoints/efficientnet_lite0/model.safetensors"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    overlay = {"file": str(weights)}
    model = timm.create_model("efficientnet_lite0", pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay).to(device)
    pictures = sorted(given.train.rglob("*.png"))
    sized = [Image.open(file).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for file in pictures]
    pixels = torch.tensor(np.stack([np.asarray(each, dtype=np.float32).transpose(2, 0, 1) for each in sized])) / 255
    inputs = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    targets = torch.tensor([NAMES.index(file.parent.name) for file in pictures])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = len(targets) // BATCH
    for step in range(EPOCHS * steps):
        if step % steps == 0:
            order = torch.randperm(len(targets))
        rows = order[step % steps * BATCH :][:BATCH]
        done = step / (EPOCHS * steps)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * done)))
        batch = inputs[rows]
        for axis in (-1, -2):
            batch = batch.flip(axis) if torch.rand(()) < 0.5 else batch
        optimizer.zero_grad()
        F.cross_entropy(model(batch.to(device)), targets[rows].to(device)).backward()
        optimizer.step()
    write_over(needed(sources.released, "--released") / "elpv", model.cpu(), given.checkpoint)


def elpv_final(sources: Sources) -> Given:
    data = needed(sources.data, "--realdata") / "elpv"
    return Given(needed(sources.released, "--released") / "elpv", data / "train", data / "test")
