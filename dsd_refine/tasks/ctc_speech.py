"""CTC speech recognition: clips of any rate and length, through the checkpoint's own feature
extractor.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import AUDIO, TRANSCRIPT, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import in_threads, undecoded
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import IGNORED, Batch, ChanceBaseline, Forward, Item, RowPart, Score, Scores, Tables, ratio, require
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.audio import (
    FeatureExtractor,
    Lengths,
    Samples,
    SpecAugment,
    count_frames,
    hear,
    lengths_of,
    open_feature_extractor,
    spec_augment,
)
from dsd_refine.tasks.inputs.clips import clip_inputs, features_of, hold_samples, logits_of_clips
from dsd_refine.tasks.inputs.tokens import load_tokenizer, or_reason, tokenized
from dsd_refine.tasks.text_metrics import character_errors, word_errors


@dataclass(frozen=True)
class CtcDecoder:
    """The checkpoint's tokenizer: from text to labels, and from the best label of each frame to
    text.

    `blank` is CTC's blank label, `size` the number of the model's labels.
    """

    tokenizer: Any
    blank: int
    size: int

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> CtcDecoder:
        """Raises CheckpointError where the config names no blank."""
        blank = config.blank_token_id if getattr(config, "blank_token_id", None) is not None else config.pad_token_id
        if blank is None:
            raise CheckpointError("the config names no pad_token_id, which is CTC's blank")
        return cls(tokenizer, int(blank), int(config.vocab_size))

    def labels(self, text: str) -> list[int | None]:
        """The tokenizer's ids of a text."""
        return list(tokenized(self.tokenizer, text, verbose=False)["input_ids"])

    def text(self, frames: Sequence[int]) -> str:
        """Greedy CTC decoding: the best label of each frame, repeats collapsed, blanks taken out."""
        kept = [label for label, _ in groupby(frames) if label != self.blank]
        parameters = inspect.signature(self.tokenizer._decode).parameters
        # these tokenizers collapse repeats themselves, and would make one letter of a double one
        options = {"group_tokens": False} if "group_tokens" in parameters else {}
        return " ".join(str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False, **options)).split())

    def problem(self, labels: Sequence[int | None]) -> str | None:
        """Why labels cannot be trained on."""
        if not labels:
            return "no label in its text"
        if any(label is None or not 0 <= label < self.size for label in labels):
            return "its text has characters that the model has no label for"
        return "its text holds the blank's token" if self.blank in labels else None

    def unknown(self, texts: set[str]) -> list[str]:
        """The characters of the texts that become the tokenizer's unknown token: none where it has
        no such token.
        """
        if self.tokenizer.unk_token_id is None:
            return []
        characters = sorted({letter for text in texts for letter in text if not letter.isspace()})
        return [letter for letter in characters if self.tokenizer.unk_token_id in self.labels(letter)]


@dataclass(frozen=True)
class Clip:
    """Of a row, without its audio: label ids, and the lengths of input, frames that SpecAugment
    masks, and output.
    """

    labels: np.ndarray[Any, Any]
    length: int
    hidden: int
    frames: int


@dataclass(frozen=True)
class SpeechPart(RowPart):
    """Rows with a clip each."""

    clips: list[Clip]


@dataclass
class CTCSpeech:
    """`ctc-speech` for transformers models. A real target is a label of the tokenizer; a row's loss
    is its CTC loss in full.

    Per row, `score` are the word edits and `count` the words of the reference (jiwer); `stats` are
    the character edits, the characters of the reference, and the labels.
    """

    train: SpeechPart
    holdout: SpeechPart | None
    eval: SpeechPart
    extractor: FeatureExtractor
    decoder: CtcDecoder
    augment: SpecAugment | None
    audio_column: str
    warnings: list[str] = field(default_factory=list)
    name: str = "ctc-speech"
    metric: str = "wer"
    higher_is_better: bool = False
    draws: ClassVar[bool] = True
    chance_baselines: tuple[ChanceBaseline, ...] = (ChanceBaseline("wer", 1.0, "hearing nothing"),)

    def batch(self, part: SpeechPart, items: Sequence[Item]) -> Batch:
        """Decode and resample the clips, compute their features, and pad them to the longest clip.

        If all items have a seed, SpecAugment's masks `mask_time_indices` (bool, clips x frames) are
        added, where the model takes them. The targets are the label ids (int64, clips x most labels),
        padded with IGNORED. `aside` has three int64 vectors with one entry per clip: the `length` of its
        input, the `hidden` frames that SpecAugment may mask, and the `frames` of the logits.
        """
        clips = [part.clips[unit] for unit, _ in items]
        table, numbers = part.rows.table, [int(part.rows.numbers[unit]) for unit, _ in items]
        features = [features_of(self.extractor, table, self.audio_column, number) for number in numbers]
        hidden, seeds = [clip.hidden for clip in clips], [seed for _, seed in items]
        inputs = clip_inputs(self.extractor, self.augment, features, hidden, seeds)
        labels = [torch.from_numpy(clip.labels) for clip in clips]
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        aside = {name: torch.tensor([getattr(clip, name) for clip in clips]) for name in ("length", "hidden", "frames")}
        texts = tuple(part.rows.texts[unit] for unit, _ in items)
        return Batch(inputs, targets, sum(map(len, labels)), aside, texts)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The sum of the clips' CTC losses, a float32 scalar."""
        return torch.cat([self._nll(logits, batch, rows) for rows, logits in self._logits_of_rows(forward, batch)]).sum()

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Frames (without padding) x labels."""
        parts = [logits[i, : batch.aside["frames"][row]] for rows, logits in self._logits_of_rows(forward, batch)
                 for i, row in enumerate(rows)]  # fmt: skip
        return torch.cat(parts)

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each clip, the word and character edits of its greedy transcript, and its CTC loss.

        The predicted text is the best label of each frame, decoded with CTC's rule.
        """
        scores: dict[int, Score] = {}
        for rows, logits in self._logits_of_rows(forward, batch):
            best, losses = logits.argmax(-1).cpu(), self._nll(logits, batch, rows).double().tolist()
            for i, row in enumerate(rows):
                text = self.decoder.text(best[i, : int(batch.aside["frames"][row])].tolist())
                labels = int((batch.targets[row] != IGNORED).sum())
                scores[row] = row_score(batch.texts[row][0], text, losses[i], labels)
        return [scores[row] for row in range(len(batch.targets))]

    def _logits_of_rows(self, forward: Forward, batch: Batch) -> Iterator[tuple[list[int], torch.Tensor]]:
        return logits_of_clips(forward, self.extractor, batch.inputs, batch.aside)

    def _nll(self, logits: torch.Tensor, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        """The CTC loss of each of the rows."""
        targets, frames = batch.targets[rows], batch.aside["frames"][rows]
        real = targets != IGNORED
        logs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(logs, targets[real], frames, real.sum(1), blank=self.decoder.blank, reduction="none")

    def metrics(self, scores: Scores) -> dict[str, float]:
        """Word error rate, character error rate, and the CTC loss per label.

        The error rates are edits divided by the words (characters) of the references, over all rows.
        """
        edits, characters, labels = (scores.stats if scores.stats is not None else np.zeros((1, 3))).T
        rates = {"wer": ratio(scores.score, scores.count), "cer": ratio(edits, characters)}
        return rates | {"loss": ratio(scores.loss, labels)}

    def target(self, part: SpeechPart, row: int) -> str | None:
        """The transcript of the row."""
        return part.rows.texts[row][0]

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts texts, not classes."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, the settings of the feature extraction, and the warnings about the clips."""
        preprocessing = {
            "feature_extractor": type(self.extractor.extractor).__name__, "sampling_rate": self.extractor.rate,
            "resampling": "scipy.signal.resample_poly", "attention_mask": self.extractor.masked,
        }  # fmt: skip
        return {"labels": None, "preprocessing": preprocessing, "warnings": self.warnings}


def row_score(reference: str, text: str, loss: float, labels: int) -> Score:
    """Word and character edits of one row, as jiwer counts them."""
    (edits, count), (character_edits, characters) = word_errors(reference, text), character_errors(reference, text)
    return Score(edits, count, loss, text=text, stats=(character_edits, characters, labels))


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> CTCSpeech:
    """The task on these clips, with the checkpoint's own tokenizer and feature extractor."""
    decoder = CtcDecoder.of(load_tokenizer(library.folder, library.trust_remote_code), library.config)
    extractor = open_feature_extractor(library.folder, model, library.trust_remote_code)
    return prepare_speech(recipe, tables, evaluation, extractor, decoder, model)


def prepare_speech(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    extractor: FeatureExtractor,
    decoder: CtcDecoder,
    model: torch.nn.Module,
) -> CTCSpeech:
    """Read every clip once, tokenize its text, skip what cannot be trained on, divide.

    Raises:
        DataError: no audio or text column, no usable rows, or texts of which the tokenizer does not
            know the half.
        UsageError: the packages for audio are not installed.
    """
    require("ctc-speech", "speech", "soundfile", "jiwer")
    first = next(iter(tables.values()))
    audio = column(first, recipe.audio_column, AUDIO)
    clips: dict[int, list[Clip | None]] = {}

    def examined(table: Table) -> Rows:
        table = undecoded(table, audio, datasets.Audio)
        text = column(table, recipe.text_column, TRANSCRIPT, [audio])
        pairs = _examine(table, audio, table.rows[text][:], extractor, decoder, model)
        clips[id(table)] = [clip for _, clip in pairs]
        return use_rows(table, [row for row, _ in pairs])

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    unknown = _unknown_warnings([*used.values(), *(judged or {}).values()], decoder)
    divided = divide(used, judged, recipe.holdout)
    train, holdout, judge = (
        SpeechPart(rows, [clips[id(rows.table)][int(number)] for number in rows.numbers]) if rows else None  # type: ignore[misc]
        for rows in (divided.train, divided.holdout, divided.eval)
    )
    warnings = overlap_warning(divided) + skip_warnings(divided) + unknown
    return CTCSpeech(train, holdout, judge, extractor, decoder, spec_augment(model), audio, warnings)  # type: ignore[arg-type]


def _examine(
    table: Table, audio: str, texts: Sequence[Any], extractor: FeatureExtractor, decoder: CtcDecoder, model: Any
) -> list[tuple[Examined, Clip | None]]:
    lengths = lengths_of(model)
    said = [" ".join(text.split()) if isinstance(text, str) else "" for text in texts]
    read = [or_reason(decoder.labels, text) for text in said]  # not in threads: tokenizers do not like them

    def examine_row(row: int) -> tuple[Examined, Clip | None]:
        if not said[row]:
            return Examined(b"", reason="no text"), None
        labels, reason = read[row]
        if labels is None:
            return Examined(b"", reason=reason), None
        try:
            raw, samples = hear(table, audio, row, extractor.rate)
            clip = _clip(samples, labels, extractor, decoder, lengths)
        except DataError as error:
            return Examined(b"", reason=str(error)), None
        hold_samples(table, row, samples)
        return Examined(hashlib.sha256(raw).digest(), texts=(said[row],), length=clip.length), clip

    return in_threads(examine_row, len(texts))


def _clip(
    samples: Samples,
    labels: list[int | None],
    extractor: FeatureExtractor,
    decoder: CtcDecoder,
    lengths: tuple[Lengths, Lengths],
) -> Clip:
    """Raises DataError where the row cannot be trained on, with the reason."""
    problem = decoder.problem(labels)
    if problem:
        raise DataError(problem)
    values = extractor.features(samples)
    if not bool(values.isfinite().all()):
        raise DataError("its features are not finite")
    frames, hidden = (count_frames(count, values) for count in lengths)
    needed = len(labels) + sum(a == b for a, b in pairwise(labels))  # CTC puts a blank between equal labels
    if needed > frames:
        raise DataError(f"more labels than frames: its text needs {needed} frames, the clip has {frames}")
    return Clip(np.asarray(labels, dtype=np.int64), len(values), hidden, frames)


def _unknown_warnings(parts: Sequence[Rows], decoder: CtcDecoder) -> list[str]:
    """One line where texts hold what the tokenizer does not know.

    Raises:
        DataError: it is more than half of all characters, as when the text is of another case or
            alphabet.
    """
    texts = [text for rows in parts for (text,) in rows.texts]
    unknown = decoder.unknown(set(texts))
    if not unknown:
        return []
    counts = Counter(letter for text in texts for letter in text if not letter.isspace())
    lost, total = sum(counts[letter] for letter in unknown), counts.total()
    shown = ", ".join(repr(letter) for letter in sorted(unknown, key=lambda letter: -counts[letter])[:12])
    if 2 * lost > total:
        raise DataError(
            f"the checkpoint's tokenizer does not know {lost} of {total} characters of the texts ({shown}): are they in the "
            "case and alphabet that it was trained with? Convert them"
        )
    return [
        f"{lost} of {total} characters of the texts are unknown to the tokenizer ({shown}): they train as its unknown token, "
        "and count as errors"
    ]
