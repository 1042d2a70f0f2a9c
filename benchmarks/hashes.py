"""SHA-256 of what a run leaves, for the demo and for one small run of each task.

A change that is to change no result prints the same before and after:

    python benchmarks/hashes.py > before.txt    # at the commit before; then at the one after, and `diff`

Weights and predictions are hashed as files; report.json without its times. The inputs are made on the fly, from fixed seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/support")]

TIMES = ("seconds", "samples_per_second", "cost")
STEPS = "--sparse-steps 3 --dense-steps 3 --batch-size 4 --control dense --control random --gate none --device cpu --quiet"

TWO = "--sparse-epochs 1 --dense-epochs 2 --sparsity 0.2,0.4 --batch-size 4 --gate none --device cpu --quiet"


def main() -> None:
    """Print a table: the run, then weights, predictions and report (the first 16 digits of each)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these runs")
    names = parser.parse_args().names
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        make_inputs(place)
        for name, (model, data, more) in RUNS.items():
            if not names or name in names:
                print(f"{name:22}", *(digest[:16] for digest in hashes(place, name, model, data, more)), flush=True)


RUNS = {
    "demo": (str(ROOT / "recipes/demo/checkpoint"), "", "--recipe digits --quiet"),
    "timm": ("timm", "pictures", STEPS),
    "timm-two-sparsities": ("timm", "pictures", TWO),
    "torchvision": ("torchvision", "colours", STEPS),
    "vit": ("vit", "colours", f"{STEPS} --optimizer adamw"),
    "text-classification": ("bert", "texts.csv", STEPS),
    "causal-lm": ("gpt2", "documents.txt", STEPS),
    "masked-lm": ("masked", "documents.txt", STEPS),
    "ctc-speech": ("speech", "sounds", STEPS),
    "image-captioning": ("captioner", "captions", STEPS),
}  # fmt: skip


def make_inputs(place: Path) -> None:
    """Tiny checkpoints and data, as the tests make them."""
    import builders

    builders.timm_checkpoint(place / "timm")
    builders.torchvision_checkpoint(place / "torchvision")
    builders.vit_checkpoint(place / "vit")
    builders.bert_checkpoint(place / "bert")
    builders.gpt2_checkpoint(place / "gpt2")
    builders.masked_checkpoint(place / "masked")
    builders.ctc_checkpoint(place / "speech")
    builders.caption_checkpoint(place / "captioner")
    builders.image_folder(place / "pictures")
    builders.image_folder(place / "colours", channels=3)
    builders.text_csv(place / "texts.csv")
    builders.text_file(place / "documents.txt")
    builders.speech_folder(place / "sounds")
    builders.caption_folder(place / "captions")


def hashes(place: Path, name: str, model: str, data: str, more: str) -> tuple[str, str, str]:
    """Run the command in a process of its own; SHA-256 of weights, predictions and report."""
    given = ["--data", data] if data else []
    command = [sys.executable, "-m", "dsd_refine", "run", model, *given, *more.split(), "-o", f"{name}-out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    out = place / f"{name}-out"
    weights = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        if "dsd" not in file.relative_to(out).parts:
            weights.update(file.read_bytes())
    predictions = hashlib.sha256((out / "dsd/predictions.parquet").read_bytes())
    text = (out / "dsd/report.json").read_text(encoding="utf-8").replace(str(ROOT), "CHECKOUT")
    report = without_times(json.loads(text))
    return weights.hexdigest(), predictions.hexdigest(), hashlib.sha256(json.dumps(report).encode()).hexdigest()


def without_times(value: Any) -> Any:
    """A report without what differs from run to run."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
