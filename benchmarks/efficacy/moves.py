"""What a step moves at several rates: what the bound of `lr: auto` was chosen by.

    python benchmarks/efficacy/moves.py TASK WORK RATE … [--realdata DIR] [--released DIR]

The source of the task's trials (fold 0), or the released one, is trained for some steps at each rate, and restored. Prints the
change of the median layer in a step, as a share of its norm (the mean of the second half of the steps), and the mean loss of
these steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from places import Sources
from search import WHOLE
from settings import averaged
from tasks import TASKS

from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.recipe import validate
from dsd_refine.run import open as opening
from dsd_refine.run.rates import MEASURED, sweep
from dsd_refine.run.run import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("work", type=Path, help="a folder for stand-in checkpoints")
    parser.add_argument("rates", type=float, nargs="+")
    parser.add_argument("--realdata", type=Path, help="the data of the real tasks")
    parser.add_argument("--released", type=Path, help="their checkpoints")
    parser.add_argument("--final", action="store_true", help="the released checkpoint in place of the stand-in of trials")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[given.task]
    sources = Sources(given.released, given.realdata, given.work)
    place = task.final(sources) if given.final else task.trial(sources, 0)
    fields = task.recipe | WHOLE | averaged(1.0, task.length) | {"data": str(place.train), "eval_data": str(place.judge)}
    source = find_source(str(place.checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        options = Options(output_dir=Path(folder) / "out", device="cpu")
        with opening.opened(source, open_library(source, fields["task"]), validate(fields), options) as run:
            for rate in given.rates:
                moves = list[float]()
                losses, _ = sweep(run, run.recipe.phases[0], [rate] * MEASURED, moves=moves)
                move, loss = (mean(each[MEASURED // 2 :]) for each in (moves, losses))
                print(f"{given.task:10} rate {rate:<8g} a step moves {move:.2e}, loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
