"""Embedding trained on texts that belong together: the passage of a query is to be closer than the passages of others.

The loss is the multiple negatives ranking loss (Henderson et al. 2017, section 4; sentence-transformers'
name): of all passages of a micro-batch, over all processes, the query's own is the right class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather, pad_across_processes
from torch.nn.parallel import DistributedDataParallel

from dsd_refine.compat import not_compiled
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, ChanceBaseline, Forward, Score, Scores, Tables, choose_metric, ratio
from dsd_refine.tasks.inputs.sentences import SentenceInputs
from dsd_refine.tasks.inputs.texts import text_digest
from dsd_refine.tasks.sentence_rows import Examiner, SentencePart, Sentences, divided

METRICS = ("ndcg_at_10", "mrr_at_10", "accuracy")
SCALES = {"cosine": 20.0, "dot": 1.0}  # of similarities in the softmax; the defaults of sentence-transformers
LAST = 10  # ranks beyond it count nothing in nDCG and MRR
AT_ONCE = 2_000_000  # similarities that are computed together in evaluation

Array = np.ndarray[Any, Any]


@dataclass
class Together(Sentences):
    """`embedding` on a query and its passage a row, and where there is one a passage that is wrong (a negative).

    `values` of a part are the numbers of the texts of each row, int64 of shape (rows, columns): equal texts
    have the same number. A passage that is right for a query in another row, or equal to the query, is never
    a negative of it. Evaluation ranks all passages of the part, so that no figure depends on a batch.

    Per row, `stats` are nDCG, MRR, and whether the right passage is the first.
    """

    higher_is_better: bool = True

    @property
    def scale(self) -> float:
        """What similarities are multiplied by in the softmax."""
        return SCALES[self.sentences.layout.similarity]

    @property
    def needs_several_rows(self) -> bool:
        """True if a row alone has no negative."""
        return len(self.columns) < 3

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The figure of ranking the passages at random."""
        value = float(np.mean([_by_chance(right, passages)[METRICS.index(self.metric)] for right, passages in self._counts()]))
        return (ChanceBaseline(self.metric, value, "ranking at random", higher_is_better=True),)

    def _counts(self) -> list[tuple[int, int]]:
        """For each evaluation row: its right passages, and all that are ranked."""
        known = _Known(self.eval.values)
        return [(len(known.right[query]), len(known.passages) - (query in known.places)) for query in self.eval.values[:, 0]]

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy of the rows, a float32 scalar.

        With several processes, the passages of all processes count. Each process then returns the loss of its
        own rows, with the gradient of the whole loss towards its own embeddings: the sum of the gradients over
        processes is that of one process with all rows.
        """
        vectors, texts = self.vectors(forward, batch), batch.targets
        if not isinstance(not_compiled(forward), DistributedDataParallel):
            return self._losses(vectors, texts).sum()
        vectors, texts, own = _of_all_processes(vectors, texts, counts=batch.count > 0)
        losses = self._losses(vectors, texts)
        whole = losses.sum()
        return losses[own].sum().detach() + whole - whole.detach()

    def _losses(self, vectors: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of each row.

        Args:
            vectors: Columns x rows x dimensions.
            texts: The numbers of the texts, rows x columns.
        """
        rows = len(texts)
        queries, passages = texts[:, 0], texts[:, 1:].T.flatten()
        logits = self.scale * vectors[0] @ vectors[1:].flatten(0, 1).T  # the right class of row i is i
        same_query = (queries[:, None] == queries[None]).float()
        is_right = same_query @ (texts[:, 1, None] == passages[None]).float() > 0
        left_out = is_right | (queries[:, None] == passages[None])
        left_out[range(rows), range(rows)] = False
        own = logits.diagonal()
        return logits.masked_fill(left_out, float("-inf")).logsumexp(1) - own

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """The vectors of each row; `together` makes scores of them."""
        by_row = self.vectors(forward, batch).transpose(0, 1).cpu().numpy()
        return [Score(0.0, 1, 0.0, vectors=row) for row in by_row]

    def together(self, part: SentencePart, units: Sequence[int], scores: Sequence[Score]) -> list[Score]:
        """For each row: how its query ranks the passages of all these rows, and the cross-entropy over them."""
        texts = part.values[list(units)]
        vectors = np.stack([score.vectors for score in scores if score.vectors is not None])
        known = _Known(texts)
        flat = vectors[:, 1:].reshape(-1, vectors.shape[-1])
        passages = flat[known.first_places]
        found: list[Score] = []
        chunk = max(1, AT_ONCE // len(passages))
        for start in range(0, len(texts), chunk):
            similar = (vectors[start : start + chunk, 0] @ passages.T).astype(np.float64)
            found += [self._score(known, texts[start + n], row) for n, row in enumerate(similar)]
        return found

    def _score(self, known: _Known, texts: Array, similar: Array) -> Score:
        """The score of a row, of its query's similarities to all passages. A tie counts against the right passage."""
        query, right = int(texts[0]), known.right[int(texts[0])]
        itself = [known.places[query]] if query in known.places else []
        wrong = np.sort(np.delete(similar, [*right, *itself]))
        values = -np.sort(-similar[right])
        ranks = 1 + np.arange(len(values)) + len(wrong) - np.searchsorted(wrong, values, side="left")
        own = similar[known.places[int(texts[1])]]
        loss = float(np.logaddexp.reduce(self.scale * np.append(wrong, own)) - self.scale * own)
        ndcg, mrr, first = _figures(ranks)
        value = {"ndcg_at_10": ndcg, "mrr_at_10": mrr, "accuracy": first}[self.metric]
        return Score(value, 1, loss, text=f"rank {int(ranks.min())}", stats=(ndcg, mrr, first))

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The task's metric, then the others: means over rows."""
        stats = scores.stats if scores.stats is not None else np.zeros((1, len(METRICS)))
        found = dict(zip(METRICS, map(float, stats.mean(0)), strict=True)) | {"loss": ratio(scores.loss, scores.count)}
        return {name: found[name] for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: SentencePart, row: int) -> str | None:
        """None: the right passage is told by its column."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, the warnings, the loss, and how texts are read."""
        similarity = self.sentences.layout.similarity
        return self.report_of(
            f"cross-entropy of the right passage among those of the micro-batch, over all processes; {similarity} times "
            f"{self.scale:g}"
        )


class _Known:
    """What is right among rows of text numbers.

    Attributes:
        passages: The numbers of all passages, each once, in the order in which they come.
        places: Number of a passage -> its place in `passages`.
        first_places: Where each passage stands first among the passages of all rows, row by row.
        right: Number of a query -> places of its right passages, in order.
    """

    def __init__(self, texts: Array) -> None:
        flat = texts[:, 1:].flatten()
        _, firsts = np.unique(flat, return_index=True)
        self.first_places = np.sort(firsts)
        self.passages = flat[self.first_places]
        self.places = {int(number): place for place, number in enumerate(self.passages)}
        right: dict[int, set[int]] = {}
        for query, passage in texts[:, :2].tolist():
            right.setdefault(query, set()).add(self.places[passage])
        self.right = {query: sorted(places) for query, places in right.items()}


def _figures(ranks: Array) -> tuple[float, float, float]:
    """nDCG and MRR at LAST, and whether a right passage is the first, of the ranks of the right passages from 1."""
    gains = 1 / np.log2(1 + ranks[ranks <= LAST])
    ideal = 1 / np.log2(1 + np.arange(1, min(len(ranks), LAST) + 1))
    best = int(ranks.min())
    return float(gains.sum() / ideal.sum()), 1 / best if best <= LAST else 0.0, float(best == 1)


def _by_chance(right: int, passages: int) -> tuple[float, float, float]:
    """The expected figures of a random order of `passages`, of which `right` are right. For MRR: as if one were right."""
    last = min(LAST, passages)
    discounts = 1 / np.log2(1 + np.arange(1, last + 1))
    ideal = discounts[: min(right, last)].sum()
    share = right / passages
    return share * float(discounts.sum()) / float(ideal), min(1.0, float((1 / np.arange(1, last + 1)).sum()) / passages), share


def _of_all_processes(vectors: torch.Tensor, texts: torch.Tensor, *, counts: bool) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """The rows of all processes, in their order, and where this process's own are. Only these have a gradient.

    Args:
        vectors: Columns x rows x dimensions.
        texts: Rows x columns.
        counts: Whether this process's rows count. If not, they only keep it in step.
    """
    from accelerate import PartialState

    rank, rows = PartialState().process_index, len(texts) if counts else 0
    sizes = gather(torch.tensor([rows], device=vectors.device)).tolist()
    by_row = vectors.detach().transpose(0, 1).contiguous()
    padded = gather(pad_across_processes(by_row)).chunk(len(sizes))
    numbers = gather(pad_across_processes(texts.contiguous())).chunk(len(sizes))
    pieces = [part[:size].transpose(0, 1) for part, size in zip(padded, sizes, strict=True)]
    pieces[rank] = vectors[:, :rows]
    start = sum(sizes[:rank])
    every = torch.cat([part[:size] for part, size in zip(numbers, sizes, strict=True)])
    return torch.cat(pieces, dim=1), every, slice(start, start + rows)


def prepare_together(
    recipe: Recipe, tables: Tables, evaluation: Tables | None, inputs: SentenceInputs, columns: tuple[str, ...]
) -> Together:
    """Skip rows that cannot be used, divide. Rows of one query stay together.

    Raises:
        DataError: no usable rows, or a recipe that accumulates gradients.
    """
    if recipe.gradient_accumulation_steps > 1:
        raise DataError(
            f"--gradient-accumulation-steps {recipe.gradient_accumulation_steps}: a row's negatives are the other rows of its "
            "micro-batch, so that several small ones are another loss than a large one: give a larger --batch-size, or more "
            "processes"
        )
    if recipe.batch_size == 1 and len(columns) == 2:
        raise DataError("--batch-size 1: a row's negatives are the other rows of its batch: give 2 or more")
    metric = choose_metric("embedding on texts that belong together", recipe.metric, METRICS, ("loss",))
    examiner, numbers = Examiner(inputs, columns), _Numbers()

    def examine(table: Table) -> Rows:
        def read(row: int, texts: Sequence[str]) -> Examined:
            numbers.see(table, row, texts)
            return Examined(text_digest(texts[0]), None, _useless(columns, texts), (text_digest(*texts[1:]).hex(),))

        return examiner.examine(table, read)

    def part(rows: Rows | None) -> SentencePart | None:
        return None if rows is None else SentencePart(rows, numbers.of(rows, len(columns)))

    parts = divided(recipe, tables, evaluation, examine)
    train, holdout, judge = (part(rows) for rows in (parts.train, parts.holdout, parts.eval))
    return Together(columns, inputs, train, holdout, judge, metric, examiner.warnings(parts))  # type: ignore[arg-type]


def _useless(columns: Sequence[str], texts: Sequence[str]) -> str | None:
    """Why nothing can be learnt from a row, or None."""
    if texts[0] == texts[1]:
        return f"{columns[0]} and {columns[1]} are the same text"
    if texts[1] in texts[2:]:
        return f"{columns[1]} and {columns[2 + texts[2:].index(texts[1])]} are the same text"
    return None


class _Numbers:
    """Numbers of texts: equal texts have the same."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}
        self.rows: dict[tuple[int, int], list[int]] = {}  # (id of a table, row) -> numbers of its texts

    def see(self, table: Table, row: int, texts: Sequence[str]) -> None:
        """Number the texts of a row."""
        self.rows[id(table), row] = [self.known.setdefault(text_digest(text.strip()), len(self.known)) for text in texts]

    def of(self, rows: Rows, columns: int) -> Array:
        """The numbers of the texts of rows, int64 of shape (rows, columns)."""
        found = [self.rows[id(rows.table), int(number)] for number in rows.numbers]
        return np.array(found, dtype=np.int64).reshape(-1, columns)
