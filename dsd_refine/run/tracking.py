"""Send a run's losses, rates, holdout values and results to experiment trackers, through Accelerate's trackers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dsd_refine.errors import UsageError
from dsd_refine.training.hooks import Hooks, Place, Step

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
PROJECT = "dsd-refine"  # the project, or MLflow's experiment. TensorBoard has none
FOLDER = "runs"  # where TensorBoard's files go, unless TENSORBOARD_LOGGING_DIR says something else


def check_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the trackers, each once.

    Raises:
        UsageError: A name is not one of TRACKERS, or its package is not installed.
    """
    from accelerate.tracking import get_available_trackers

    names = tuple(dict.fromkeys(names))
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--report-to {name}: not a tracker; known are {', '.join(TRACKERS)}")
        if name not in [str(available) for available in get_available_trackers()]:
            raise UsageError(f"--report-to {name}: is not installed: `pip install {name}`")
    return names


class Tracking(Hooks):
    """Logs a run. A tracker that fails while the run trains is dropped with a message; the run goes on.

    The trackers start at the first event, because only then the run has chosen its device. Steps are
    counted over the whole run, all arms together, because some trackers take only rising numbers.

    Args:
        names: The result of `check_trackers`.
        run_name: The name of the run in the trackers.
        config: The settings to show, by name.
        say: Called with each line of news.
    """

    def __init__(self, names: Iterable[str], run_name: str, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.names, self.run_name, self.config, self.say = tuple(names), run_name, dict(config), say
        self.trackers: list[Any] | None = None
        self.done = 0  # optimizer steps of the whole run so far

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers or ():
            self._guarded(tracker, tracker.finish)

    def on_phase_begin(self, place: Place) -> None:
        """Start the trackers before the first step.

        Raises:
            UsageError: A tracker cannot start.
        """
        self._started()

    def on_step(self, step: Step) -> None:
        """Log the loss and the rate of a step."""
        self.done, arm = step.done, _arm(step.place)
        self._log({f"{arm}/loss": step.loss, f"{arm}/lr": step.lr, f"{arm}/epoch": step.epoch})

    def on_holdout(self, place: Place, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics on the holdout."""
        self.done = place.before + step
        self._log({f"{_arm(place)}/holdout/{name}": value for name, value in metrics.items()})

    def on_report(self, report: Mapping[str, Any]) -> None:
        """Log the results: the arms, the comparisons, the verdict, the credit and the gate."""
        values = {f"eval/{arm}/{name}": value for arm, metrics in report["arms"].items() for name, value in metrics.items()}
        for name, result in report["comparison"].items():
            low, high = result["ci95"]
            named = {"delta": result["delta"], "ci95_low": low, "ci95_high": high, "p_adjusted": result["p_adjusted"]}
            values |= {f"comparison/{name}/{key}": value for key, value in named.items()}
        self._log({name: float(value) for name, value in values.items()})
        gate = f"{report['gate']['rule']}: {'met' if report['gate']['passed'] else 'not met'}"
        said = {"verdict": report["verdict"], "credit": report["credit"], "gate": gate}
        for tracker in tuple(self._started()):
            self._guarded(tracker, partial(_log_texts, tracker, said, self.done))

    def _log(self, values: dict[str, float]) -> None:
        for tracker in tuple(self._started()):
            self._guarded(tracker, partial(tracker.log, values, step=self.done))

    def _guarded(self, tracker: Any, call: Callable[[], object]) -> None:
        """Make a call of a tracker. If it fails, drop the tracker: the run matters more."""
        try:
            call()
        except Exception as error:  # each tracker has errors of its own
            self.trackers = [other for other in self.trackers or () if other is not tracker]
            self.say(f"--report-to {tracker.name}: it failed and gets no more values ({' '.join(str(error).split())[:200]})")

    def _started(self) -> list[Any]:
        """Return the trackers. The first call starts them."""
        if self.trackers is None:
            self.trackers = [_start(name, self.run_name, self.config) for name in self.names]
        return self.trackers


def _arm(place: Place) -> str:
    """The arm, and its try if there are several, as a part of a name: `refined-try-2`."""
    return place.label.rpartition("/")[0].replace(" ", "-")


def _start(name: str, run_name: str, config: Mapping[str, Any]) -> Any:
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

    make: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: TensorBoardTracker(run_name, os.environ.get("TENSORBOARD_LOGGING_DIR", FOLDER)),
        "wandb": lambda: WandBTracker(PROJECT, name=run_name),
        "mlflow": lambda: MLflowTracker(PROJECT, run_name=run_name),
        "trackio": lambda: TrackioTracker(PROJECT, name=run_name),
    }
    try:
        tracker = make[name]()
        tracker.start()
        tracker.store_init_configuration(dict(config))
    except Exception as error:  # each tracker has errors of its own
        raise UsageError(f"--report-to {name}: cannot start ({' '.join(str(error).split())[:300]})") from None
    return tracker


def _log_texts(tracker: Any, texts: Mapping[str, str], step: int) -> None:
    """Log texts. MLflow takes them as tags only."""
    if tracker.name == "mlflow":
        import mlflow

        mlflow.set_tags(dict(texts))
    else:
        tracker.log(dict(texts), step=step)


def settings_of(model: str, recipe: Mapping[str, Any], output_dir: Path) -> dict[str, Any]:
    """Return the settings of a run as one flat mapping of numbers and texts, for the trackers.

    Args:
        model: MODEL as the user wrote it.
        recipe: The recipe as a mapping.
        output_dir: The folder OUT.
    """
    settings: dict[str, Any] = {"model": model, "output": output_dir.name}
    for name, value in recipe.items():
        if name == "phases":
            for number, phase in enumerate(value, 1):
                settings |= {f"phase{number}.{key}": _flat(setting) for key, setting in phase.items() if setting is not None}
        elif value not in (None, [], (), {}):
            settings[name] = _flat(value)
    return settings


def _flat(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else str(value)
