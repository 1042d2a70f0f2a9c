"""What a task is: rows to batches, batches to a loss or to a score for each row, scores to metrics.

The loop calls three functions of a task (batch, loss, score). It knows no task, and a task knows no
loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Rows
from dsd_refine.errors import DataError
from dsd_refine.extras import require as require  # tasks take it from here

Item = tuple[int, int | None]  # unit of a part, and the seed of its augmentation (None: as in evaluation)

Forward = Callable[..., Any]

Tables = dict[str, Table]  # split -> its rows

IGNORED = -100  # target of a position that the loss ignores, torch's default


@dataclass(frozen=True)
class Batch:
    """Collated examples. `inputs` go to the model by name (`x`: by position); `count` is the number
    of real targets.

    `aside` and `texts` have an entry a row: what the task's loss and scores need and the model does
    not take. `items` say which units it was made of, where the loop made it.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    count: int
    aside: dict[str, torch.Tensor] = field(default_factory=dict)
    texts: tuple[tuple[str, ...], ...] = ()
    items: tuple[Item, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """A copy of the batch with `inputs`, `targets` and `aside` on the device."""

        def moved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: sent(value, device) for name, value in tensors.items()}

        targets = sent(self.targets, device)
        return replace(self, inputs=moved(self.inputs), targets=targets, aside=moved(self.aside))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device. To a GPU it goes from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Score:
    """The score of one unit: the metric is the sum of `score` over the sum of `count`; `loss` is
    its summed training loss.

    `text` is the prediction of a task that predicts text; `stats` are sums that the task's other
    metrics are made of. `vectors` is what a task needs of each unit to score all of them together
    (its method `together`), float32 of any shape.
    """

    score: float
    count: int
    loss: float
    prediction: int | None = None
    text: str | None = None
    stats: tuple[float, ...] = ()
    vectors: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Scores:
    """Of each row of a part, in its order: float64 arrays; `prediction` is -1 where the task
    predicts no class.

    `text` is the predicted text (None: the task predicts none), `stats` is rows x statistics (None:
    it has none).
    """

    score: np.ndarray[Any, Any]
    count: np.ndarray[Any, Any]
    loss: np.ndarray[Any, Any]
    prediction: np.ndarray[Any, Any]
    text: list[str] | None = None
    stats: np.ndarray[Any, Any] | None = None

    @classmethod
    def of(cls, unit_scores: Iterable[tuple[int, Score]], rows: int) -> Scores:
        """Add up pairs of a row and the score of one of its units."""
        pairs = list(unit_scores)
        text = [""] * rows if any(unit.text is not None for _, unit in pairs) else None
        width = max((len(unit.stats) for _, unit in pairs), default=0)
        new = cls(np.zeros(rows), np.zeros(rows), np.zeros(rows), np.full(rows, -1), text, np.zeros((rows, width)))
        for row, unit in pairs:
            new.score[row] += unit.score
            new.count[row] += unit.count
            new.loss[row] += unit.loss
            if unit.prediction is not None:
                new.prediction[row] = unit.prediction
            if text is not None and unit.text is not None:
                text[row] = unit.text
            if unit.stats and new.stats is not None:
                new.stats[row] += unit.stats
        return new if width else replace(new, stats=None)

    def compared(self, corpus: object | None) -> np.ndarray[Any, Any]:
        """What arms are compared by: the score of each row, or its statistics where the metric is
        one of the corpus.
        """
        return self.score if corpus is None or self.stats is None else self.stats

    def pack(self) -> dict[str, torch.Tensor]:
        """As tensors, for the saved state; texts are UTF-8 bytes with the offset of each one's end."""
        names = ("score", "count", "loss", "prediction", *(["stats"] if self.stats is not None else []))
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in names}
        if self.text is not None:
            coded = [text.encode("utf-8", "surrogatepass") for text in self.text]
            tensors["text"] = torch.tensor(list(b"".join(coded)), dtype=torch.uint8)
            tensors["text_ends"] = torch.tensor([len(text) for text in coded], dtype=torch.int64).cumsum(0)
        return tensors

    @classmethod
    def unpack(cls, tensors: Mapping[str, torch.Tensor]) -> Scores:
        """The reverse of `pack`."""
        arrays: dict[str, Any] = {name: value.numpy() for name, value in tensors.items() if not name.startswith("text")}
        if "text" not in tensors:
            return cls(**arrays)
        ends, coded = tensors["text_ends"].tolist(), bytes(tensors["text"].tolist())
        texts = [coded[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False)]
        return cls(**arrays, text=texts)


@dataclass(frozen=True)
class RowMetric:
    """A metric that needs all rows together, such as a rank correlation: no function of sums over rows.

    `of_samples(stats, times)` computes it for samples of the rows. `stats` are the rows' statistics, of
    shape (rows, statistics). `times` says how often each row is in each sample, of shape (samples, rows).
    The result has shape (samples,).
    """

    of_samples: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], np.ndarray[Any, Any]]


Corpus = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | RowMetric  # from sums (…, statistics) to (…), or of rows


def corpus_value(corpus: Corpus, stats: np.ndarray[Any, Any]) -> float:
    """The metric of all rows, from their statistics, shape (rows, statistics)."""
    if isinstance(corpus, RowMetric):
        return float(corpus.of_samples(stats, np.ones((1, len(stats))))[0])
    return float(corpus(stats.sum(0)))


@dataclass(frozen=True)
class ChanceBaseline:
    """The score of a trivial predictor: `value` of `metric`, and `how` it predicts. A source that
    does no better is probably used wrongly.

    `rows`: the metric is the share of so many rows that are right (None: it is no count of rows).
    """

    metric: str
    value: float
    how: str
    rows: int | None = None
    higher_is_better: bool = False


class Part(Protocol):
    """One part of the data, as a task prepared it: `units` examples, each belonging to a row of
    `rows`.
    """

    @property
    def rows(self) -> Rows:
        """The usable rows of this part, in the order of its scores."""
        ...

    @property
    def units(self) -> int:
        """The number of units (examples). Units are numbered from 0."""
        ...

    def row_of(self, unit: int) -> int:
        """The index in `rows` of the row that the unit belongs to."""
        ...


@dataclass(frozen=True)
class RowPart:
    """A part of which each row is one unit."""

    rows: Rows

    @property
    def units(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def row_of(self, unit: int) -> int:
        """The unit itself."""
        return unit


def unit_lengths(part: Part) -> np.ndarray[Any, Any] | None:
    """Return how long each unit is as an input, in tokens or samples of sound, shape (units,).

    It is the `lengths` of the part if it has them, else those of its rows, of which each is a unit.
    None: units have no length, as pictures of one size.
    """
    lengths: np.ndarray[Any, Any] | None = getattr(part, "lengths", getattr(part.rows, "lengths", None))
    return lengths


class Task(Protocol):
    """One kind of model and data. `metric` is the name in the report; all metrics are fractions or
    sums over counts.
    """

    name: str
    metric: str
    higher_is_better: bool
    draws: ClassVar[bool]  # does a batch depend on the seeds of its items?

    @property
    def train(self) -> Part:
        """The part that the model is trained on."""
        ...

    @property
    def holdout(self) -> Part | None:
        """The part that selects between tries and epochs; None if there is no holdout."""
        ...

    @property
    def eval(self) -> Part:
        """The part that the arms are compared on."""
        ...

    @property
    def chance_baselines(self) -> Sequence[ChanceBaseline]:
        """What the source must do better than on the evaluation rows, the simplest predictor first."""
        ...

    def batch(self, part: Any, items: Sequence[Item]) -> Batch:
        """Load, transform and collate; runs in worker processes."""
        ...

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed loss over the batch's real targets, a float32 scalar."""
        ...

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """One score a unit, in the batch's order."""
        ...

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metrics over rows, `metric` first."""
        ...

    def target(self, part: Any, row: int) -> str | None:
        """What row is labelled, for the predictions file."""
        ...

    def shown(self, prediction: int) -> str | None:
        """A prediction's name, for the predictions file."""
        ...

    def report(self) -> Mapping[str, Any]:
        """Task-specific report entries: `labels`, `preprocessing`, and `warnings`."""
        ...


def choose_metric(task: str, asked: str | None, allowed: Sequence[str], measured: Sequence[str] = ()) -> str:
    """The metric that decides: the asked one, else the first that is allowed.

    `measured` are metrics that are only reported.

    Raises:
        DataError: the asked metric is not one that can decide here.
    """
    if asked is None or asked in allowed:
        return asked or allowed[0]
    known = f"metric: {asked}: {task} is measured by {', '.join(allowed)} here"
    only = f"; {asked} is reported beside it, but there is no test of it" if asked in measured else ""
    raise DataError(f"{known}{only}")


def ratio(total: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> float:
    """Sum over sum: the same whatever the batch size."""
    return float(total.sum() / max(1, count.sum()))
