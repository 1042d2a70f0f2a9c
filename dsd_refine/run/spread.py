"""Train the tries of a run side by side: each process of a launcher trains whole tries, as one process alone would.

Nothing is exchanged but results. A try begins with the source and its own seed, so it does not matter who trains it. Each
process works in a folder of its own, OUT.partial/tries/process-N-of-M.partial/, with a state of its own. It leaves the
result of a finished try in OUT.partial/tries/ARM-TRY/. Afterwards the main process makes the run as ever, and takes over the
results in the order in which it would have trained the tries. So the bytes are those of a run in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_refine.errors import Interrupted, UsageError
from dsd_refine.files import replace_text, sha256_file
from dsd_refine.run.judge import look_at_source, score_arm, warn
from dsd_refine.run.lost import next_try, record_try
from dsd_refine.run.open import PATIENCE, opened
from dsd_refine.run.rates import test_rates
from dsd_refine.run.signals import Signals
from dsd_refine.run.state import Selected
from dsd_refine.run.workspace import Workspace
from dsd_refine.search import rung_of

if TYPE_CHECKING:
    from dsd_refine.checkpoint.library import Library
    from dsd_refine.checkpoint.source import Source
    from dsd_refine.recipe import Recipe
    from dsd_refine.run.run import Options, Run

TRIES, RESULT = "tries", "result.json"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_A_TRY = ("histograms", "zeros", "masked", "empty")  # fields of the state with a key for each try of the refined arm
BEGINS = "try"  # the event in a process's log with which a try begins
MEETINGS = count()  # numbers the meetings of all processes: each counts the same ones
POLL = 0.2  # seconds between two looks for results of other processes


def is_asked(options: Options) -> bool:
    """Return whether tries are to be trained side by side. A single process has nobody beside it.

    Raises:
        UsageError: The model is to be divided too.
    """
    if options.spread and options.shard:
        raise UsageError("--spread tries gives each process whole tries, and --shard divides the model; give one of them")
    return options.spread == TRIES and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def alone() -> Iterator[tuple[int, int]]:
    """Let this process be the only one inside a `with` block, on its own GPU. Yields its number and the number of all."""
    before = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        _choose_gpu(int(before.get("LOCAL_RANK", "0")))
        yield int(before["RANK"]), int(before["WORLD_SIZE"])
    finally:
        os.environ.update(before)


def _choose_gpu(number: int) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def train_side_by_side(
    source: Source, library: Library, recipe: Recipe, options: Options, train_try: Callable[[Run, str, int], None]
) -> bool:
    """Train this process's share of the tries. In the main process, also wait for the others.

    Returns:
        Whether this is the main process, which goes on with the results.

    Raises:
        UsageError: OUT cannot be used.
        Interrupted: The run was asked to stop. The states are saved.
    """
    workspace = Workspace(options.output_dir, writes=os.environ["RANK"] == "0", save_every=options.save_every)
    folder = workspace.partial / TRIES
    with ExitStack() as stack:
        if workspace.writes:
            workspace.check_target(source.folder, resume=options.resume, overwrite=options.overwrite)
            stack.enter_context(workspace.locked())
            if not options.resume:
                workspace.clear()
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            if len(options.hooks) > 1:  # the first one is the display
                options.say("--spread tries: callbacks and trackers see no step of the tries, only the report")
        _wait_for_all()
        rank, world = stack.enter_context(alone())
        own = folder / f"process-{rank}-of-{world}"  # its state is of the tries that it has among so many
        done = folder / f"process-{rank}.done"
        done.unlink(missing_ok=True)
        quiet = replace(
            options, output_dir=own, resume=True, overwrite=False, spread=None, hooks=(), say=lambda _: None, report_images=0
        )
        with opened(source, library, recipe, quiet) as run:
            score_arm(run, "baseline")
            look_at_source(run)
            test_rates(run)
            tries = [(arm, attempt) for arm in run.arms for attempt in run.tries]
            for arm, attempt in tries[rank::world]:
                _take_part(run, arm, attempt, folder, train_try)
                options.say(f"{arm} try {attempt + 1} is trained (process {rank} of {world})")
        done.write_text("")
        if rank == 0:
            _wait_for_files([folder / f"process-{number}.done" for number in range(world)])
    return workspace.writes


def _wait_for_files(files: Sequence[Path]) -> None:
    """Wait until the files are there. If another process dies, the launcher ends this one.

    Raises:
        Interrupted: The run was asked to stop.
    """
    with Signals() as signals:
        signals.wait()
        while not all(file.is_file() for file in files):
            if signals.asked:
                raise Interrupted("stopped while other processes trained; go on with --resume")
            time.sleep(POLL)


def _wait_for_all() -> None:
    """Wait until all processes are here, so that none begins before the main one has checked OUT.

    The launcher's store counts them. A process group would do, but a second one in the same launch finds the addresses
    of the first.
    """
    store, key = _launchers_store(), f"dsd-refine/{next(MEETINGS)}"
    if store.add(key, 1) == int(os.environ["WORLD_SIZE"]):
        store.set(f"{key}/all", "here")
    while not store.check([f"{key}/all"]):  # to wait in the store would keep signals off
        time.sleep(POLL)


@cache
def _launchers_store() -> Any:  # a torch.distributed.Store, which torch exports to no type checker
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=PATIENCE))[0]


def _take_part(run: Run, arm: str, attempt: int, folder: Path, train_try: Callable[[Run, str, int], None]) -> None:
    """Train a try, unless its result is there, and leave the result."""
    place = folder / f"{arm}-{attempt}"
    if (place / RESULT).is_file() and _result(place, run):
        return
    _know_earlier_rungs(run, arm, attempt, folder)
    position = [run.arms.index(arm), attempt, 0]
    at, is_within = run.state.at, run.state.progress is not None
    if at is None or at < position or (at == position and not is_within):  # the try begins: earlier ones are delivered
        run.state.best, run.state.ingredients = {}, {}
        run.workspace.log({"event": BEGINS})
    train_try(run, arm, attempt)
    if any((each["arm"], each["attempt"]) == (arm, attempt) for each in run.state.tries):  # else a search left it out
        _deliver(run, arm, attempt, place)


def _know_earlier_rungs(run: Run, arm: str, attempt: int, folder: Path) -> None:
    """Wait for the results that decide the setting of a try: those of the rungs before it, of the same seed."""
    first = attempt - attempt % run.tries_per_seed
    rung = rung_of(run.rungs, attempt - first)
    for earlier in range(first, attempt):
        known = {(each["arm"], each["attempt"]) for each in run.state.tries}
        if rung_of(run.rungs, earlier - first) == rung or (arm, earlier) in known or run.setting(arm, earlier) is None:
            continue
        while (result := _result(folder / f"{arm}-{earlier}", run)) is None:
            if run.loop.stopping():
                raise Interrupted("stopped while another process trained an earlier rung; go on with --resume")
            time.sleep(POLL)
        run.state.tries.append(result["try"])
    # In the order of one process, which decides between equal results.
    run.state.tries.sort(key=lambda each: (run.arms.index(each["arm"]), each["attempt"]))


def _deliver(run: Run, arm: str, attempt: int, place: Path) -> None:
    """Leave the result of a finished try in its folder. The file `RESULT` is the last."""
    state, workspace = run.state, run.workspace
    [record] = [each for each in state.tries if (each["arm"], each["attempt"]) == (arm, attempt)]
    chosen = state.best.get(arm, {}).get(str(attempt // run.tries_per_seed))
    place.mkdir(parents=True, exist_ok=True)
    if chosen is not None:
        _link(workspace.partial / chosen.file, place / chosen.file)
    phases = workspace.partial / "phases" / str(attempt)
    if arm == "refined" and phases.is_dir():
        shutil.copytree(phases, place / "phases", dirs_exist_ok=True)
    workspace.write_log()
    lines = [json.loads(line) for line in workspace.log_file.read_text().splitlines()]
    begins = max(number for number, line in enumerate(lines) if line["event"] == BEGINS)
    result = {
        "identity": _identity(run),
        "phases": [each for each in state.phases if (each["arm"], each["attempt"]) == (arm, attempt)],
        "lost": [each for each in state.lost if (each["arm"], each["try"]) == (arm, attempt + 1)],
        "try": record, "chosen": asdict(chosen) if chosen else None, "log": lines[begins + 1 :], "harm": state.harm,
        "sha256": sha256_file(place / chosen.file) if chosen else None,
        **{name: _of_try(getattr(state, name), arm, attempt) for name in OF_A_TRY},
    }  # fmt: skip
    replace_text(place / RESULT, json.dumps(result))


def _of_try(found: Mapping[str, Any], arm: str, attempt: int) -> dict[str, Any]:
    """The part of a field of the state that is of a try. Such fields are of the refined arm."""
    return {name: value for name, value in found.items() if name == str(attempt) and arm == "refined"}


def take_over(run: Run, arm: str, attempt: int) -> bool:
    """Take over the result of a try that another process trained, as if it had been trained here.

    Returns:
        False: there is no such result, or the try was finished or begun before, so it is to be trained here.
    """
    state, workspace, position = run.state, run.workspace, [run.arms.index(arm), attempt, 0]
    place = workspace.partial / TRIES / f"{arm}-{attempt}"
    result = _result(place, run)
    if result is None or (state.at is not None and state.at > position):
        return False
    state.phases += result["phases"]
    state.lost += result["lost"]
    for name in OF_A_TRY:
        getattr(state, name).update(result[name])
    for line in result["log"]:
        workspace.log(line)
    warn(run, result["harm"])
    state.try_best, state.candidate = result["try"]["holdout"], None
    if result["chosen"] is not None:
        state.candidate = Selected(**result["chosen"])
        _link(place / state.candidate.file, workspace.partial / state.candidate.file)
        workspace.state.setdefault("files", {})[state.candidate.file] = result["sha256"]
    if (place / "phases").is_dir():
        shutil.copytree(place / "phases", workspace.partial / "phases" / str(attempt), dirs_exist_ok=True)
    record_try(run, arm, attempt, result["try"]["lost"])
    state.at, state.progress = next_try(run, position[0], attempt), None
    run.save()
    return True


def _result(place: Path, run: Run) -> dict[str, Any] | None:
    """Return the result of a try. None: it is not there, or is of a run with another recipe, source or data."""
    try:
        result: dict[str, Any] = json.loads((place / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    chosen = result.get("chosen")
    is_whole = chosen is None or (place / chosen["file"]).is_file()
    return result if is_whole and result.get("identity") == _identity(run) else None


def _identity(run: Run) -> str:
    """A digest of all that decides the result of a try."""
    return hashlib.sha256(json.dumps(run.workspace.state["identity"], sort_keys=True).encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk has no such names. A target that is there is replaced."""
    if not source.exists() and target.exists():  # an earlier process was stopped right after this
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
