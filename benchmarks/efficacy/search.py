"""Search for settings that make a checkpoint better, one trial at a time:

    python benchmarks/efficacy/search.py TASK WORK [--realdata DIR] [--released DIR] [--only NAME …] [--arms A,B] [--seeds N]

Every trial is a run of `dsd_refine.refine` as users call it. It leaves one line in benchmarks/results/efficacy/TASK.jsonl; a
trial that is there is not run again. `--table` prints the ledger as a table, the best setting first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import ledger
from places import FOLDS, Given, Sources
from settings import Changes, arms_of, as_arm, settings
from tasks import TASKS, EfficacyTask

import dsd_refine
from dsd_refine.errors import RunError
from dsd_refine.recipe import validate

# Nothing is selected in a trial, unless the setting says so: its end is judged, by rows that the source does not know.
WHOLE = {"holdout": 0.0, "keep": "last", "gate": "none", "control": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("work", type=Path, help="a folder for stand-in checkpoints")
    parser.add_argument("--realdata", type=Path, help="the data of the real tasks")
    parser.add_argument("--released", type=Path, help="their checkpoints")
    parser.add_argument("--only", nargs="*", default=[], help="only these settings")
    parser.add_argument("--arms", default="refined,dense", help="which arms, separated by commas")
    parser.add_argument("--seeds", type=int, default=FOLDS, help="how many seeds; seed n uses fold n mod 3")
    parser.add_argument("--ledger", type=Path, help="the file of the ledger")
    parser.add_argument("--device", default="cpu", help="where the trials run")
    parser.add_argument(
        "--share", default="1/1", help="K/N: only each N-th trial, from the K-th on, for N processes side by side"
    )
    parser.add_argument("--quick", action="store_true", help="two steps for each phase, to try the code")
    parser.add_argument("--prepare", action="store_true", help="make the checkpoints and rows of the task, run nothing")
    parser.add_argument("--table", action="store_true", help="print the ledger, run nothing")
    given = parser.parse_args()
    file = given.ledger or ledger.FOLDER / f"{given.task}.jsonl"
    task, sources = TASKS[given.task], Sources(given.released, given.realdata, given.work)
    if given.prepare:
        for fold in range(FOLDS):
            print(task.trial(sources, fold))
        return
    if not given.table:
        torch.set_num_threads(1)
        wanted = wanted_trials(task, given.only, given.arms.split(","), given.seeds)
        share, shares = map(int, given.share.split("/"))
        search(task, sources, file, wanted[share - 1 :: shares], given.device, given.quick)
    print(table(ledger.read(file)))


def wanted_trials(task: EfficacyTask, only: list[str], arms: list[str], seeds: int) -> list[tuple[int, str, Changes, str]]:
    """Every setting and arm with one seed, then with the next: seed, name, changes, arm.

    Settings that differ only in their masks have the same dense control. It is there once.
    """
    found: dict[tuple[str, int], tuple[int, str, Changes, str]] = {}
    for seed in range(seeds):
        for name, changes in settings(task.rate, task.length, task.average, light_crop=task.images).items():
            for arm in arms_of(changes):
                if name in (only or [name]) and (arm in arms or len(arms_of(changes)) == 1):
                    key = ledger.key({"recipe": as_arm(changes, arm), "seed": seed})
                    found.setdefault(key, (seed, name, changes, arm))
    return list(found.values())


def search(
    task: EfficacyTask,
    sources: Sources,
    file: Path,
    wanted: list[tuple[int, str, Changes, str]],
    device: str = "cpu",
    quick: bool = False,
) -> None:
    """Run the trials that the ledger lacks."""
    done = {ledger.key(trial) for trial in ledger.read(file)}
    for seed, name, changes, arm in wanted:
        if ledger.key({"recipe": as_arm(changes, arm), "seed": seed}) not in done:
            place = task.trial(sources, seed % FOLDS)
            ledger.append(file, trial(task, place, name, changes, arm, seed, device, quick))


def trial(
    task: EfficacyTask, place: Given, name: str, changes: Changes, arm: str, seed: int, device: str, quick: bool = False
) -> ledger.Trial:
    """Run one setting as one arm with one seed, and return its line."""
    fields: dict[str, Any] = task.recipe | WHOLE | as_arm(changes, arm) | {"seed": seed}
    if quick:
        fields["phases"] = [{k: v for k, v in phase.items() if k != "epochs"} | {"steps": 2} for phase in fields["phases"]]
    line: ledger.Trial = {"setting": name, "arm": arm, "seed": seed, "recipe": as_arm(changes, arm)}
    started = time.time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = dsd_refine.refine(
                str(place.checkpoint), data=str(place.train), eval_data=str(place.judge), output_dir=Path(folder) / "out",
                recipe=validate(fields), quiet=True, device=device,
            )  # fmt: skip
            line |= outcome(report)
    except RunError as error:
        line |= {"diverged": True, "error": str(error).splitlines()[0][:200]}
    seconds = round(time.time() - started, 1)
    where = torch.cuda.get_device_name() if device == "cuda" else device
    return line | {"seconds": seconds, "version": dsd_refine.__version__, "device": where}


def outcome(report: dsd_refine.Report) -> ledger.Trial:
    """What a trial gained on the rows that judged it."""
    data = report.data
    metric, source, result = data["metric"]["name"], data["arms"]["baseline"], data["arms"]["refined"]
    compared = report.comparison["baseline"]
    return {
        "metric": metric, "source": source[metric], "result": result[metric], "gain": compared.delta,
        "source_loss": source.get("loss"), "loss": result.get("loss"), "gained": compared.gained, "lost": compared.lost,
        "rows": data["data"]["eval"]["rows"], "rate": data["phases"][0]["lr_peak"], "diverged": False,
    }  # fmt: skip


def table(trials: list[ledger.Trial]) -> str:
    """The ledger, one line for each setting and arm: mean gain over its seeds with its standard error, and the loss."""
    by_setting = defaultdict(list)
    for each in trials:
        by_setting[each["setting"], each["arm"]].append(each)
    lines = []
    for (setting, arm), group in by_setting.items():
        ended = [each for each in group if not each["diverged"]]
        gains = np.array([each["gain"] for each in ended])
        mean = float(gains.mean()) if ended else float("-inf")
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        losses = np.mean([each["loss"] - each["source_loss"] for each in ended]) if ended else float("nan")
        seconds = np.mean([each["seconds"] for each in group])
        lines.append((mean, f"{setting:70} {arm:8} {len(group):3} {len(group) - len(ended):8}  {mean:+.4f} ± {error:.4f}  "
                            f"{losses:+.4f}  {seconds:6.0f}"))  # fmt: skip
    head = f"{'setting':70} {'arm':8} {'n':>3} {'diverged':>8}  gain ± error     loss     seconds"
    return "\n".join([head, *(line for _, line in sorted(lines, reverse=True))])


if __name__ == "__main__":
    main()
