"""What a run has found out so far, as it is saved: JSON, beside the tensors that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsd_refine.training.state import Progress

Metrics = dict[str, float]
Place = list[int]  # of the next phase: number of the arm, of the try, of the phase, each from 0


@dataclass
class Selected:
    """The weights that the holdout prefers of an arm and a seed: where they are, and what they are.

    `file` is in OUT.partial/; `returned` counts, by layer, the weights that have the source's values back.
    """

    file: str
    attempt: int
    epoch: int
    sparsity: float | None
    seed: int
    holdout: Metrics | None
    returned: dict[str, int]


@dataclass
class RunState:
    """Everything of a run that a stop must keep, but for tensors. Keys of inner mappings are texts, as in JSON.

    Attributes:
        at: the phase that comes next, or that runs; None before the first.
        progress: how far the phase at `at` is; None between phases.
        phases: the entries of the report, with `attempt`, the number of the try.
        best: arm -> number of the seed -> what the holdout chose.
        judged: the arms (and seeds) whose scores on the evaluation split are saved.
        looked: whether the source was tried on holdout and training rows.
        source_holdout: its metrics there; None without a holdout.
        source_loss: its mean loss on the first training rows, as training shows them.
        baseline_warnings: what is odd about the source on these data.
        harm: warnings that training makes the weights worse.
        histograms: number of the try -> layer -> weight histograms of the refined arm.
        zeros: number of the try -> layer -> weights that were 0 at the end of its first sparse phase.
        empty: the same for filters: layer -> (filters of zeros alone, filters).
        returned: layer -> masked weights that had no gradient in a dense phase and were given back.
        masked_only: no step has followed the mask of this try.
        scaler: the fp16 loss scale, which was found by trying.
    """

    at: Place | None = None
    progress: Progress | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, Selected]] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    looked: bool = False
    source_holdout: Metrics | None = None
    source_loss: float | None = None
    baseline_warnings: list[str] = field(default_factory=list)
    harm: list[str] = field(default_factory=list)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    zeros: dict[str, dict[str, int]] = field(default_factory=dict)
    empty: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    returned: dict[str, int] = field(default_factory=dict)
    masked_only: bool = False
    scaler: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a mapping that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RunState:
        """What `to_json` gave; an empty mapping is a new run."""
        state = cls(**saved)
        if saved.get("progress") is not None:
            state.progress = Progress(**saved["progress"])
        state.best = {
            arm: {seed: Selected(**chosen) for seed, chosen in seeds.items()} for arm, seeds in saved.get("best", {}).items()
        }
        return state
