"""What the tasks of encoder-decoders share: a teacher-forced loss, and texts that the model writes.

The loss trains and selects. Texts are written for the evaluation split alone, unless the loss is the metric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.forward import logits_of
from dsd_refine.tasks.base import IGNORED, Batch, ChanceBaseline, Forward, Item, RowPart, Score, Scores, ratio
from dsd_refine.tasks.causal_lm import uniform_baseline
from dsd_refine.tasks.inputs.writer import TextWriter

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TargetPart(RowPart):
    """Rows with their targets. `labels[u]` are the tokens that the decoder is to write for row u, and
    `shifted[u]` those that it sees before each of them. `sources[u]` are the encoder's tokens (empty: the
    encoder reads the table).
    """

    labels: list[Array]
    shifted: list[Array]
    sources: list[Array] = field(default_factory=list)


@dataclass
class EncoderDecoder(ABC):
    """A task whose encoder reads a row and whose decoder writes a text. A real target is a token of the text.

    Per row, `stats` are what `measure` gives for the written text (zeros on the holdout, where none is
    written), and last the number of targets.
    """

    train: TargetPart
    holdout: TargetPart | None
    eval: TargetPart
    writer: TextWriter
    metric: str
    warnings: list[str] = field(default_factory=list)
    draws: ClassVar[bool] = False
    name: ClassVar[str]
    trivial: ClassVar[str]  # how a predictor that writes nothing is called

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of sums that `measure` gives."""

    @abstractmethod
    def encoder_inputs(self, part: TargetPart, units: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the encoder reads of these rows, by the model's names."""

    @abstractmethod
    def measure(self, references: Sequence[str], text: str) -> tuple[float, ...]:
        """The sums of one written text that the metrics are made of. `references` are the right texts of its row."""

    @abstractmethod
    def row_value(self, sums: Sequence[float]) -> tuple[float, float]:
        """`score` and `count` of a row, of its sums."""

    @abstractmethod
    def written_metrics(self, sums: Array) -> dict[str, float]:
        """The metrics of written texts, of the sums of all rows."""

    @property
    @abstractmethod
    def corpus(self) -> Callable[[Array], Array] | None:
        """The metric of summed `stats`, for the bootstrap. None: it is a ratio of sums."""

    @property
    def writes(self) -> bool:
        """Whether texts are written: the metric is no loss."""
        return self.metric != "loss"

    @property
    def higher_is_better(self) -> bool:
        """False for the loss and for error rates."""
        return self.metric not in ("loss", "wer", "cer")

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The loss of a uniform guess among the tokenizer's tokens, and the metric of writing nothing."""
        tokens = min(len(self.writer.tokenizer), self.writer.size or len(self.writer.tokenizer))
        value = 0.0 if self.higher_is_better else 1.0
        nothing = ChanceBaseline(self.metric, value, self.trivial, higher_is_better=self.higher_is_better)
        return (uniform_baseline(tokens), *([nothing] if self.writes else []))

    def batch(self, part: TargetPart, items: Sequence[Item]) -> Batch:
        """The encoder's inputs, and the labels padded to the longest ones.

        `decoder_input_ids`, their mask and the targets are int64 of shape rows x longest labels. Padding is
        told by length, never by an id, and has the target IGNORED. `aside["final"]` (bool, one a row) is
        True where a text is to be written. The seeds of the items are not used.
        """
        units = [unit for unit, _ in items]
        labels, seen = ([torch.from_numpy(of[unit].astype(np.int64)) for unit in units] for of in (part.labels, part.shifted))
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        real = torch.arange(targets.shape[1]) < torch.tensor([[len(ids)] for ids in labels])
        filler = int(self.writer.tokenizer.pad_token_id or 0)
        inputs = self.encoder_inputs(part, units) | {
            "decoder_input_ids": torch.nn.utils.rnn.pad_sequence(seen, batch_first=True, padding_value=filler),
            "decoder_attention_mask": real.long(),
        }
        final = torch.tensor([part is self.eval and self.writes] * len(units))
        return Batch(inputs, targets, int(real.sum()), {"final": final}, tuple(part.rows.texts[unit] for unit in units))

    def grouped(self, batch: Batch) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        """Rows that go through the model together, and their inputs: all rows, unless padding would leak in."""
        return [(list(range(len(batch.targets))), batch.inputs)]

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Targets x vocabulary."""
        return torch.cat([logits_of(forward, inputs)[batch.targets[rows] != IGNORED] for rows, inputs in self.grouped(batch)])

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The sum of -log p(token) over all targets, a float32 scalar."""
        return torch.stack([self._nll(forward, batch, *group).sum() for group in self.grouped(batch)]).sum()

    def _nll(self, forward: Forward, batch: Batch, rows: Sequence[int], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """-log p of each target of these rows, rows x longest labels; 0 for padding."""
        logits, targets = logits_of(forward, inputs), batch.targets[rows]
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.reshape(targets.shape)

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each row the summed -log p of its targets, and the sums of the text that is written for it."""
        scores: dict[int, Score] = {}
        for rows, inputs in self.grouped(batch):
            losses = self._nll(forward, batch, rows, inputs).double().sum(1).tolist()
            read = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
            writes = bool(batch.aside["final"].all())
            texts = self.writer.generate(forward, read) if writes else [None] * len(rows)
            for row, loss, text in zip(rows, losses, texts, strict=True):
                targets = int((batch.targets[row] != IGNORED).sum())
                scores[row] = self._score(batch.texts[row], text, loss, targets)
        return [scores[row] for row in range(len(batch.targets))]

    def _score(self, references: Sequence[str], text: str | None, loss: float, targets: int) -> Score:
        if not self.writes:
            return Score(loss, targets, loss, stats=(targets,))
        if text is None:
            return Score(0.0, 0, loss, stats=(*[0.0] * self.width, targets))
        sums = self.measure(references, text)
        score, count = self.row_value(sums)
        return Score(float(score), int(count), loss, text=text, stats=(*map(float, sums), targets))

    def metrics(self, scores: Scores) -> dict[str, float]:
        """The metric that decides, the other metrics of written texts, and the mean loss per target token.

        Without written texts there is only the loss.
        """
        stats = scores.stats if scores.stats is not None else np.zeros((1, 1))
        loss = {"loss": ratio(scores.loss, stats[:, -1])}
        if scores.text is None:
            return loss
        found = self.written_metrics(stats.sum(0)) | loss
        return {name: found[name] for name in (self.metric, *(name for name in found if name != self.metric))}

    def target(self, part: TargetPart, row: int) -> str | None:
        """The text that is to be written for the row, or several that are right, one a line."""
        return "\n".join(part.rows.texts[row])

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts texts, not classes."""
        return None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How rows are read and texts are written, for the report."""
        generation = self.writer.generation
        shown = ("num_beams", "max_new_tokens", "max_length", "forced_bos_token_id", "language", "task", "no_repeat_ngram_size")
        set_values = {name: value for name in shown if (value := getattr(generation, name, None)) is not None}
        return {"generation": {"sampling": False, **set_values}} if self.writes else {}

    def report(self) -> Mapping[str, Any]:
        """No labels, how texts are written, and the warnings about the rows."""
        return {"labels": None, "preprocessing": self.preprocessing, "warnings": self.warnings}
