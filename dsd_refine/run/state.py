"""The state of a run that is saved as JSON, beside the tensor files that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dsd_refine.training.state import Progress

Metrics = dict[str, float]
Place = list[int]  # the next phase: the numbers of its arm, its try and the phase itself, each from 0


@dataclass
class Selected:
    """The weights that the holdout prefers, of one arm and one seed.

    Attributes:
        file: The name of their file in OUT.partial/.
        attempt: The number of the try that they are from, from 0.
        epoch: The number of the epoch of the last phase that they are from.
        sparsity: The sparsity of the try. None if no phase is sparse.
        seed: The seed of the try.
        holdout: Their metrics on the holdout. None without a holdout.
        returned: Layer name -> number of weights that have the source's values back.
        share: How far they are from the source on the way to the trained weights (see `interpolate`).
        members: The numbers of the tries that a soup mixes, from 0. Empty if it is none.
        rounds: How many rounds they are the mean of (see `dsd_refine.run.rounds`).
    """

    file: str
    attempt: int
    epoch: int
    sparsity: float | None
    seed: int
    holdout: Metrics | None
    returned: dict[str, int]
    share: float = 1.0
    members: list[int] = field(default_factory=list)
    rounds: int = 1


@dataclass
class RangeTest:
    """A range test of the rate (see `dsd_refine.run.rates`).

    Attributes:
        rate: The rate that was chosen.
        edge: The highest rate before the loss rose. None: it rose at none.
        rates: The rates of the steps, in order. They end where the loss had risen.
        losses: The loss of each step.
        source_losses: The loss of the source on the same rows.
        moves: The rates that were measured after that, each with what a step moved: the change of the
            median layer as a share of its norm.
        samples: The number of examples that were used.
        seconds: How long it took.
    """

    rate: float
    edge: float | None
    rates: list[float]
    losses: list[float]
    source_losses: list[float]
    moves: list[tuple[float, float]]
    samples: int
    seconds: float


@dataclass
class RunState:
    """Everything that a stopped run must keep, except tensors.

    The keys of inner mappings are texts, as in JSON.

    Attributes:
        at: The phase that runs now or comes next. None before the first phase.
        progress: How far the phase `at` is. None between phases.
        phases: The entries of phases in the report, each with `attempt`, the number of the try.
        best: Arm -> number of the seed -> the weights that the holdout chose.
        judged: The arms (and seeds) whose scores on the evaluation split are saved.
        looked: Whether the source was scored on holdout and training rows.
        source_holdout: The source's metrics on the holdout. None without a holdout.
        rates: Optimizer -> the range test of its rate.
        source_loss: The source's mean loss on the first training rows, in training form.
        baseline_warnings: Warnings about the source on these data.
        harm: Warnings that training makes the weights worse.
        histograms: Number of the try -> layer -> weight histograms of the refined arm.
        zeros: Number of the try -> layer -> number of zeros at the end of its first sparse phase.
        masked: Number of the try -> layer -> number of masked weights at the end of its first sparse phase.
        empty: Number of the try -> layer -> (number of filters with only zeros, number of filters).
        returned: Layer -> number of masked weights that had no gradient in a dense phase and have the
            source's values again.
        below: How many evaluations on the holdout in a row have shown this try clearly below the source.
        candidate: Weights of this try that the holdout prefers to the arm's best so far. They become the
            best at the end of the try, if it does not diverge.
        try_best: The best metrics on the holdout of this try so far.
        tries: The finished tries: arm, attempt, setting, steps, best metrics on the holdout, and why it is
            lost, if it is.
        interpolated: The arms and seeds for which weights between the source and them were tried.
        ingredients: Arm -> the weights of each of its tries that is not lost, if a soup is asked for.
        soups: Arm -> its soup; None if there is none.
        round_mean: The name of the file with the mean over the rounds of this try so far.
        rounds: How many rounds of this try the mean has.
        lost: The tries that were lost: arm, attempt, seed, phase, step, loss and reason.
        masked_only: Whether no optimizer step has followed the mask of this try.
        scaler: The state of the fp16 loss scaler.
    """

    at: Place | None = None
    progress: Progress | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, Selected]] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    looked: bool = False
    source_holdout: Metrics | None = None
    rates: dict[str, RangeTest] = field(default_factory=dict)
    source_loss: float | None = None
    baseline_warnings: list[str] = field(default_factory=list)
    harm: list[str] = field(default_factory=list)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    zeros: dict[str, dict[str, int]] = field(default_factory=dict)
    masked: dict[str, dict[str, int]] = field(default_factory=dict)
    empty: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    returned: dict[str, int] = field(default_factory=dict)
    below: int = 0
    candidate: Selected | None = None
    try_best: Metrics | None = None
    tries: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    interpolated: list[list[str]] = field(default_factory=list)
    ingredients: dict[str, list[Selected]] = field(default_factory=dict)
    soups: dict[str, Selected | None] = field(default_factory=dict)
    round_mean: str | None = None
    rounds: int = 0
    masked_only: bool = False
    scaler: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the state as a mapping that JSON can store."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RunState:
        """Return the state from the mapping of `to_json`. An empty mapping gives the state of a new run."""
        state = cls(**saved)
        if saved.get("progress") is not None:
            state.progress = Progress(**saved["progress"])
        if saved.get("candidate") is not None:
            state.candidate = Selected(**saved["candidate"])
        state.rates = {name: RangeTest(**test) for name, test in saved.get("rates", {}).items()}
        state.ingredients = {arm: [Selected(**e) for e in tries] for arm, tries in saved.get("ingredients", {}).items()}
        state.soups = {arm: Selected(**found) if found else None for arm, found in saved.get("soups", {}).items()}
        state.best = {
            arm: {seed: Selected(**chosen) for seed, chosen in seeds.items()} for arm, seeds in saved.get("best", {}).items()
        }
        return state
