"""The run's own hooks: the log, the weight histograms of the refined arm, and what asks for a stop or a save."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsd_refine.masking import histograms
from dsd_refine.run.signals import Signals
from dsd_refine.run.workspace import Workspace
from dsd_refine.training.hooks import Hooks, Place, Step

if TYPE_CHECKING:
    from dsd_refine.run.run import Run


class Housekeeping(Hooks):
    """A line of log.jsonl for each step; a signal stops the run; the workspace knows when a save is due."""

    def __init__(self, workspace: Workspace, signals: Signals) -> None:
        self.workspace, self.signals = workspace, signals

    def on_step(self, step: Step) -> None:
        self.workspace.log(
            {"event": "step", **step.place.logged, "step": step.step, "epoch": step.epoch, "lr": step.lr, "loss": step.loss,
             "samples": step.samples, "skipped": step.skipped}
        )  # fmt: skip

    def should_stop(self) -> bool:
        return self.signals.asked

    def should_save(self) -> bool:
        return self.workspace.save_due()


class HistogramRecorder(Hooks):
    """Records weight histograms at the paper's five moments (its section 4), for report.html."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_phase_begin(self, place: Place) -> None:
        if place.phase == 1 or place.kind == "dense":
            self._record(place, "start" if place.phase == 1 else "unmasked")

    def on_masked(self, place: Place) -> None:
        self._record(place, "pruned")

    def on_phase_end(self, place: Place) -> None:
        if place.kind == "dense":
            self._record(place, "after re-D")
        elif any(picture["moment"] == "pruned" for pictures in self._book(place).values() for picture in pictures):
            self._record(place, "after S")

    def _book(self, place: Place) -> histograms.Histograms:
        return self.run.state.histograms.setdefault(str(place.attempt - 1), {})

    def _record(self, place: Place, moment: str) -> None:
        if place.arm == "refined":
            parameters = self.run.loop.parameters
            histograms.record(self._book(place), histograms.choose_layers(self.run.layers, parameters), parameters, moment)
