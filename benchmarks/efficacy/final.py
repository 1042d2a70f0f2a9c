"""The final comparison of a task, with the default recipe: what a user gets.

    python benchmarks/efficacy/final.py TASK WORK [--realdata DIR] [--released DIR] [--seeds N] [--recipe NAME] [--keep last]

Runs the default command (no flag of the task) with `--publish best`, the controls dense and random, and five seeds; then SWA
of the same budget: one phase without a mask at the recipe's first rate, held constant. Writes both summaries, with intervals
over seeds and rows, to benchmarks/results/efficacy/TASK.txt. The evaluation rows are read by this command alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import ledger
from places import Given, Sources
from tasks import TASKS, EfficacyTask

import dsd_refine
from dsd_refine.recipe import Recipe, read_recipe, validate
from dsd_refine.report.report import summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("work", type=Path, help="a folder for checkpoints and data that are made")
    parser.add_argument("--realdata", type=Path, help="the data of the real tasks")
    parser.add_argument("--released", type=Path, help="their checkpoints")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", help="another recipe than the default one")
    parser.add_argument("--keep", choices=("best", "last"), help="otherwise than the recipe says")
    parser.add_argument("--device", default="cpu", help="where the runs run")
    parser.add_argument("--out", type=Path, help="the file of the result")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    place = TASKS[given.task].final(Sources(given.released, given.realdata, given.work))
    text = f"{machine(given.device)}\n\n{compared(TASKS[given.task], place, given)}"
    out = given.out or ledger.FOLDER / f"{given.task}.txt"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(text)


def machine(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    return f"{where}, Python {platform.python_version()}, {versions}"


def compared(task: EfficacyTask, place: Given, given: argparse.Namespace) -> str:
    """Both runs: the default command with its controls, and SWA of the same budget."""
    common = {"seeds": given.seeds, "gate": "none", "device": given.device}
    common |= {"keep": given.keep} if given.keep else {}
    if "max_length" in task.recipe:  # what the checkpoint was trained with; the command cannot know it
        common["max_length"] = task.recipe["max_length"]
    first, used = run(place, given.recipe, common | {"control": ["dense", "random"], "publish": "best"})
    swa = used | {"name": "swa of the same budget", "phases": [averaged(used["phases"])], "control": [], "publish": "refined"}
    second, _ = run(place, validate(swa), {"device": given.device})
    kept = f", --keep {given.keep}" if given.keep else ""
    how = f"with --recipe {given.recipe}" if given.recipe else "the default command"
    return f"# {how}, --publish best{kept}\n\n{first}\n\n# SWA of the same budget, no mask\n\n{second}\n"


def averaged(phases: list[dict[str, Any]]) -> dict[str, Any]:
    """One phase of the same length at the first rate, held constant; the weights at the epochs' ends are averaged."""
    unit = "epochs" if "epochs" in phases[0] else "steps"
    warmup = phases[0].get("warmup_steps", 0)
    phase = {"kind": "dense", unit: sum(phase[unit] for phase in phases), "lr": phases[0]["lr"], "warmup_steps": warmup}
    return phase | {"schedule": "constant", "average": "swa"}


def run(place: Given, recipe: str | Recipe | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Refine; return the summary and the fields of the recipe that was used."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = dsd_refine.refine(
            str(place.checkpoint), data=str(place.train), eval_data=str(place.judge), output_dir=out, recipe=recipe,
            quiet=True, **options,
        )  # fmt: skip
        text = summary(report).replace(f"{folder}/", "").replace(f"{place.checkpoint.parent}/", "")
        return f"{text.rstrip()}\n\n{time.time() - started:.0f} s", read_recipe(out / "dsd/recipe.yaml")


if __name__ == "__main__":
    main()
