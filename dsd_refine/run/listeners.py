"""The run's own hooks: they write the log, record weight histograms, and ask for stops and saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsd_refine.masking import histograms
from dsd_refine.run.signals import Signals
from dsd_refine.run.workspace import Workspace
from dsd_refine.training.hooks import Hooks, Place, Step

if TYPE_CHECKING:
    from dsd_refine.run.run import Run


class Housekeeping(Hooks):
    """Writes a line of log.jsonl for each step, and asks for a stop after a signal, and for saves."""

    def __init__(self, workspace: Workspace, signals: Signals) -> None:
        self.workspace, self.signals = workspace, signals

    def on_step(self, step: Step) -> None:
        """Write the step to log.jsonl."""
        self.workspace.log(
            {"event": "step", **step.place.logged, "step": step.step, "epoch": step.epoch, "lr": step.lr, "loss": step.loss,
             "samples": step.samples, "skipped": step.skipped}
        )  # fmt: skip

    def should_stop(self) -> bool:
        """Return whether a signal asked the run to stop."""
        return self.signals.asked

    def should_save(self) -> bool:
        """Return whether the workspace is due for a save."""
        return self.workspace.save_due()


class HistogramRecorder(Hooks):
    """Records weight histograms at the five moments of the paper (section 4), for report.html."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_phase_begin(self, place: Place) -> None:
        """Record the source, or the weights at the beginning of a dense phase."""
        if place.phase == 1 or place.kind == "dense":
            self._record(place, "start" if place.phase == 1 else "unmasked")

    def on_masked(self, place: Place) -> None:
        """Record the weights right after masking."""
        self._record(place, "pruned")

    def on_phase_end(self, place: Place) -> None:
        """Record the weights at the end of a dense phase, or of a sparse phase that had a mask."""
        if place.kind == "dense":
            self._record(place, "after re-D")
        elif any(picture["moment"] == "pruned" for pictures in self._recorded(place).values() for picture in pictures):
            self._record(place, "after S")

    def _recorded(self, place: Place) -> histograms.Histograms:
        """Return the histograms recorded so far in this try. New ones are added to them."""
        return self.run.state.histograms.setdefault(str(place.attempt - 1), {})

    def _record(self, place: Place, moment: str) -> None:
        if place.arm == "refined":
            parameters = self.run.loop.whole(self.run.loop.parameters)
            histograms.record(self._recorded(place), histograms.choose_layers(self.run.layers, parameters), parameters, moment)
