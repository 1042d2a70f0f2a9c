"""Make the demo's data and checkpoint anew: `python recipes/demo/make_demo.py` (seconds on one CPU core, no network).

Writes train.parquet, test.parquet and checkpoint/ beside this file. README.md there says what they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
NAMES = [str(digit) for digit in range(10)]

SEED = 0
TEST_ROWS = 597  # leaves 1,200 to train on: 20 whole batches, so no BatchNorm step sees a scrap
BATCH = 60
EPOCHS = 3  # stopped early on purpose: a refiner needs errors left to correct, in training too (12 epochs get 98.5 %)
PEAK_LR = 0.02

# timm's smallest ResNet: 1.5 MB, with every kind of layer its large brothers have.
ARCHITECTURE = "test_resnet"
# How its input is made. 32 pixels are the least that reach its last stage (stride 32) with one left.
PRETRAINED_CFG = {
    "input_size": (1, 32, 32),
    "pool_size": (1, 1),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    # The weights are ours, not those that timm publishes for this architecture.
    "tag": None,
    "hf_hub_id": None,
}

Pixels = npt.NDArray[np.uint8]


def main() -> None:
    # One thread: the order of floating-point sums, and so every byte, is then the same whatever the number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train, test = make_datasets()
    train.to_parquet(HERE / "train.parquet")
    test.to_parquet(HERE / "test.parquet")
    save(train_model(train))
    # Measured on what was written, loaded as anyone would load it.
    model = timm.create_model(f"local-dir:{CHECKPOINT}", pretrained=True)
    print(
        f"accuracy: train {accuracy(model, train):.4f} ({len(train):,} rows), "
        f"test {accuracy(model, test):.4f} ({len(test)} rows)"
    )


def make_datasets() -> tuple[Any, Any]:
    """The training and the test rows, each in scikit-learn's order."""
    digits = load_digits()
    pixels: Pixels = digits.images.astype(np.uint8)  # whole numbers from 0 (white paper) to 16 (ink)
    in_test = split(pixels)
    return to_dataset(pixels[~in_test], digits.target[~in_test]), to_dataset(pixels[in_test], digits.target[in_test])


def split(pixels: Pixels) -> npt.NDArray[np.bool_]:
    """True for the `TEST_ROWS` images with the smallest hash of their content.

    A hash depends on no library's random numbers. The salt keeps this order apart from that of any other split by hash
    of the same rows, such as the holdout that dsd-refine carves from the training rows.
    """
    digests = [hashlib.sha256(b"digits demo" + image.tobytes()).digest() for image in pixels]
    chosen = np.zeros(len(pixels), dtype=np.bool_)
    chosen[sorted(range(len(pixels)), key=digests.__getitem__)[:TEST_ROWS]] = True
    return chosen


def to_dataset(pixels: Pixels, labels: npt.NDArray[np.int64]) -> Any:
    """Rows of `image` (PNG, 8-bit grey, 8x8) and `label`; `datasets` stores both features in the Parquet file."""
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8)
    columns = {"image": [Pillow.fromarray(image) for image in grey], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=NAMES)}))


def train_model(rows: Any, epochs: int = EPOCHS) -> nn.Module:
    """A dense baseline: plain SGD with a cosine from `PEAK_LR` to 0, no augmentation."""
    torch.manual_seed(SEED)
    model: nn.Module = timm.create_model(
        ARCHITECTURE, in_chans=1, num_classes=len(NAMES), pretrained_cfg_overlay=PRETRAINED_CFG
    )
    inputs, targets = preprocess(model, rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(targets) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(targets)).split(BATCH):  # type: ignore[no-untyped-call]
            loss = F.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model


def preprocess(model: nn.Module, rows: Any) -> tuple[Tensor, Tensor]:
    """Inputs (N, 1, 32, 32) through timm's own evaluation transform, so that others measure what is measured here."""
    transform = create_transform(**resolve_data_config({}, model=model))
    return torch.stack([transform(image) for image in rows["image"]]), torch.tensor(rows["label"])


def save(model: nn.Module) -> None:
    """Write config.json and model.safetensors in timm's layout."""
    names = {"label_names": NAMES}
    save_for_hf(model, str(CHECKPOINT), model_config=names, model_args={"in_chans": 1}, safe_serialization=True)
    (CHECKPOINT / "model.safetensors").chmod(0o644)  # it is written for its owner alone


@torch.inference_mode()
def accuracy(model: nn.Module, rows: Any) -> float:
    inputs, targets = preprocess(model, rows)
    predictions = model.eval()(inputs).argmax(dim=1)
    return float((predictions == targets).float().mean())


if __name__ == "__main__":
    main()
