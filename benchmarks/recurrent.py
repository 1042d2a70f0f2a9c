"""An LSTM network on scikit-learn's digits: `python benchmarks/recurrent.py OUT`.

Trains a small `sequencer2d` of timm (bidirectional LSTMs in both directions of the picture) as the first Dense phase, then
refines it, and prints the summary for benchmarks/results/recurrent.txt.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from datasets import load_dataset
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "recipes/demo"
SHAPE = {
    "in_chans": 1, "img_size": 32, "layers": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 64), "hidden_sizes": (8, 16, 16, 16),
    "patch_sizes": (4, 2, 1, 1),
}  # fmt: skip
INPUT = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "interpolation": "bilinear"}
OPTIONS = (
    "--optimizer", "adamw", "--sparse-epochs", "6", "--dense-epochs", "6", "--lr", "0.001", "--batch-size", "60", "--sparsity",
    "0.3", "--control", "dense", "--control", "random", "--gate", "none", "--set", "augment={crop: none, flip: 0.0}",
)  # fmt: skip


def first_dense(folder: Path, epochs: int = 12) -> None:
    """A plain AdamW run on the demo's training rows, written in timm's layout."""
    torch.manual_seed(0)
    overlay = {**INPUT, "tag": None, "hf_hub_id": None}
    model = timm.create_model("sequencer2d_s", num_classes=10, pretrained_cfg_overlay=overlay, **SHAPE)
    rows = load_dataset("parquet", data_files=str(DIGITS / "train.parquet"), split="train")
    transform = create_transform(**resolve_data_config({}, model=model))
    x, y = torch.stack([transform(image) for image in rows["image"]]), torch.tensor(rows["label"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * len(y) // 60
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    names = {"label_names": [str(digit) for digit in range(10)]}
    save_for_hf(model, str(folder), model_config=names, model_args=SHAPE, safe_serialization=True)


def main() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}", flush=True)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    first_dense(out / "sequencer2d")
    data = ("--data", str(DIGITS / "train.parquet"), "--eval-data", str(DIGITS / "test.parquet"))
    command = [sys.executable, str(ROOT / "cli.py"), str(out / "sequencer2d"), *data, "-o", str(out / "refined"), "--overwrite"]
    print(f"$ dsd-refine sequencer2d {' '.join(OPTIONS)}\n", flush=True)
    done = subprocess.run([*command, "--quiet", *OPTIONS], capture_output=True, text=True, check=True)
    print(done.stdout.replace(f"{out}/", ""))


if __name__ == "__main__":
    main()
