"""CTC speech recognition: clips of any rate and length, heard through the checkpoint's own feature extractor."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.data.columns import AUDIO, TRANSCRIPT, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import in_threads, raw_bytes, undecoded
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Forward, Guess, Item, Score, Scores, ratio, require
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.audio import (
    Hearing,
    Lengths,
    SpecAugment,
    count_frames,
    decode,
    lengths_of,
    resample,
    spec_augment,
)
from dsd_refine.tasks.inputs.tokens import or_reason, tokenized


def open_words(tokenizer: Any, config: Any) -> Words:
    """The tokenizer with the model's blank."""
    blank = config.blank_token_id if getattr(config, "blank_token_id", None) is not None else config.pad_token_id
    if blank is None:
        raise CheckpointError("the config names no pad_token_id, which is CTC's blank")
    return Words(tokenizer, int(blank), int(config.vocab_size))


@dataclass(frozen=True)
class Words:
    """The checkpoint's tokenizer, both ways. `blank` is CTC's, `size` the number of the model's labels."""

    tokenizer: Any
    blank: int
    size: int

    def labels(self, text: str) -> list[int | None]:
        """The tokenizer's ids of a text."""
        return list(tokenized(self.tokenizer, text, verbose=False)["input_ids"])

    def text(self, frames: Sequence[int]) -> str:
        """Greedy CTC decoding: the best label of each frame, repeats collapsed, blanks taken out."""
        kept = [label for label, _ in groupby(frames) if label != self.blank]
        parameters = inspect.signature(self.tokenizer._decode).parameters
        # these tokenizers collapse repeats by themselves, and would take a double letter for one
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
        """The characters of the texts that the tokenizer does not know: none where it has no token for such."""
        if self.tokenizer.unk_token_id is None:
            return []
        characters = sorted({one for text in texts for one in text if not one.isspace()})
        return [one for one in characters if self.tokenizer.unk_token_id in self.labels(one)]


@dataclass(frozen=True)
class Clip:
    """What is known of a row before its sound is needed: label ids, and lengths of input, masked frames and output."""

    labels: np.ndarray[Any, Any]
    length: int
    hidden: int
    frames: int


@dataclass(frozen=True)
class SpeechPart:
    """Rows with a clip each."""

    rows: Rows
    clips: list[Clip]

    @property
    def units(self) -> int:
        return len(self.rows)

    def row_of(self, unit: int) -> int:
        return unit


@dataclass
class CTCSpeech:
    """`ctc-speech` for transformers models. A real target is a label of the tokenizer; a row's loss is its CTC loss in full.

    Per row, `score` are the word edits and `count` the words of the reference (jiwer); `stats` are the character edits, the
    characters of the reference, and the labels.
    """

    train: SpeechPart
    holdout: SpeechPart | None
    eval: SpeechPart
    hearing: Hearing
    words: Words
    augment: SpecAugment | None
    audio_column: str
    warnings: list[str] = field(default_factory=list)
    name: str = "ctc-speech"
    metric: str = "wer"
    higher_is_better: bool = False
    guesses: tuple[Guess, ...] = (Guess("wer", 1.0, "hearing nothing"),)

    def batch(self, part: SpeechPart, items: Sequence[Item]) -> Batch:
        clips = [part.clips[unit] for unit, _ in items]
        inputs = {self.hearing.name: self.hearing.together([self._sound(part, unit) for unit, _ in items])}
        length, hidden, frames = torch.tensor([(c.length, c.hidden, c.frames) for c in clips]).T
        if self.hearing.masked:
            inputs["attention_mask"] = (torch.arange(int(length.max())) < length[:, None]).long()
        if self.augment is not None and all(seed is not None for _, seed in items):
            masks = [self.augment.draw(clip.hidden, int(seed or 0)) for clip, (_, seed) in zip(clips, items, strict=True)]
            inputs["mask_time_indices"] = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        labels = [torch.from_numpy(clip.labels) for clip in clips]
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        aside = {"length": length, "hidden": hidden, "frames": frames}
        texts = tuple(part.rows.texts[unit] for unit, _ in items)
        return Batch(inputs, targets, sum(map(len, labels)), aside, texts)

    def _sound(self, part: SpeechPart, unit: int) -> torch.Tensor:
        samples, rate = decode(raw_bytes(part.rows.table, self.audio_column, int(part.rows.numbers[unit])))
        return self.hearing.features(resample(samples, rate, self.hearing.rate))

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        return torch.cat([self._nll(logits, batch, rows) for rows, logits in self._heard(forward, batch)]).sum()

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Frames of sound x labels."""
        parts = [logits[i, : batch.aside["frames"][row]] for rows, logits in self._heard(forward, batch)
                 for i, row in enumerate(rows)]  # fmt: skip
        return torch.cat(parts)

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        found: dict[int, Score] = {}
        for rows, logits in self._heard(forward, batch):
            best, losses = logits.argmax(-1).cpu(), self._nll(logits, batch, rows).double().tolist()
            for i, row in enumerate(rows):
                text = self.words.text(best[i, : int(batch.aside["frames"][row])].tolist())
                labels = int((batch.targets[row] != -100).sum())
                found[row] = row_score(batch.texts[row][0], text, losses[i], labels)
        return [found[row] for row in range(len(batch.targets))]

    def _heard(self, forward: Forward, batch: Batch) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(rows, their logits). A model without mask hears clips of one length at a time, without padding: what it computes
        for a clip then does not depend on the others, in evaluation as in training.
        """
        if self.hearing.masked:
            yield list(range(len(batch.targets))), logits_of(forward, batch.inputs)
            return
        lengths = batch.aside["length"].tolist()
        for length in dict.fromkeys(lengths):
            rows = [row for row, one in enumerate(lengths) if one == length]
            inputs = {self.hearing.name: batch.inputs[self.hearing.name][rows].narrow(self.hearing.axis, 0, length)}
            if "mask_time_indices" in batch.inputs:
                inputs["mask_time_indices"] = batch.inputs["mask_time_indices"][rows, : int(batch.aside["hidden"][rows[0]])]
            yield rows, logits_of(forward, inputs)

    def _nll(self, logits: torch.Tensor, batch: Batch, rows: Sequence[int]) -> torch.Tensor:
        """The CTC loss of each of the rows."""
        targets, frames = batch.targets[rows], batch.aside["frames"][rows]
        real = targets != -100
        logs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(logs, targets[real], frames, real.sum(1), blank=self.words.blank, reduction="none")

    def metrics(self, scores: Scores) -> dict[str, float]:
        edits, characters, labels = (scores.stats if scores.stats is not None else np.zeros((1, 3))).T
        found = {"wer": ratio(scores.score, scores.count), "cer": ratio(edits, characters)}
        return found | {"loss": ratio(scores.loss, labels)}

    def target(self, part: SpeechPart, row: int) -> str | None:
        return part.rows.texts[row][0]

    def shown(self, prediction: int) -> str | None:
        return None

    def report(self) -> Mapping[str, Any]:
        preprocessing = {
            "feature_extractor": type(self.hearing.extractor).__name__, "sampling_rate": self.hearing.rate,
            "resampling": "scipy.signal.resample_poly", "attention_mask": self.hearing.masked,
        }  # fmt: skip
        return {"labels": None, "preprocessing": preprocessing, "warnings": self.warnings}


def row_score(reference: str, text: str, loss: float, labels: int) -> Score:
    """Word and character edits of one row, as jiwer counts them."""
    import jiwer

    words, characters = jiwer.process_words(reference, text), jiwer.process_characters(reference, text)
    edits, count = _edits(words)
    character_edits, characters_count = _edits(characters)
    return Score(edits, count, loss, text=text, stats=(character_edits, characters_count, labels))


def _edits(found: Any) -> tuple[int, int]:
    edits = found.substitutions + found.deletions + found.insertions
    return edits, found.hits + found.substitutions + found.deletions


def prepare_speech(
    recipe: Recipe, tables: dict[str, Table], evaluation: dict[str, Table] | None, hearing: Hearing, words: Words, model: Any
) -> CTCSpeech:
    """Hear every clip once, tokenize its text, skip what cannot be trained on, divide.

    Raises:
        DataError: no audio or text column, no usable rows, or texts of which the tokenizer does not know the half.
        UsageError: the packages for sound are not installed.
    """
    require("ctc-speech", "speech", "soundfile", "jiwer")
    first = next(iter(tables.values()))
    audio = column(first, recipe.audio_column, AUDIO)
    clips: dict[int, list[Clip | None]] = {}

    def examined(table: Table) -> Rows:
        table = undecoded(table, audio, datasets.Audio)
        text = column(table, recipe.text_column, TRANSCRIPT, [audio])
        found = _examine(table, audio, table.rows[text][:], hearing, words, model)
        clips[id(table)] = [clip for _, clip in found]
        return use_rows(table, [row for row, _ in found])

    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    unknown = _unknown_warnings([*used.values(), *(judged or {}).values()], words)
    divided = divide(used, judged, recipe.holdout)
    train, holdout, judge = (
        SpeechPart(rows, [clips[id(rows.table)][int(at)] for at in rows.numbers]) if rows else None  # type: ignore[misc]
        for rows in (divided.train, divided.holdout, divided.eval)
    )
    warnings = overlap_warning(divided) + skip_warnings(divided) + unknown
    return CTCSpeech(train, holdout, judge, hearing, words, spec_augment(model), audio, warnings)  # type: ignore[arg-type]


def _examine(
    table: Table, audio: str, texts: Sequence[Any], hearing: Hearing, words: Words, model: Any
) -> list[tuple[Examined, Clip | None]]:
    lengths = lengths_of(model)
    said = [" ".join(text.split()) if isinstance(text, str) else "" for text in texts]
    read = [or_reason(words.labels, text) for text in said]  # not in threads: tokenizers do not like them

    def one(row: int) -> tuple[Examined, Clip | None]:
        if not said[row]:
            return Examined(b"", reason="no text"), None
        labels, reason = read[row]
        if labels is None:
            return Examined(b"", reason=reason), None
        try:
            raw = raw_bytes(table, audio, row)
            clip = _clip(raw, labels, hearing, words, lengths)
        except OSError as error:
            return Examined(b"", reason=f"unreadable file ({error.strerror or error})"), None
        except (DataError, TypeError) as error:
            return Examined(b"", reason=str(error) if isinstance(error, DataError) else "no audio"), None
        return Examined(hashlib.sha256(raw).digest(), texts=(said[row],)), clip

    return in_threads(one, len(texts))


def _clip(raw: bytes, labels: list[int | None], hearing: Hearing, words: Words, lengths: tuple[Lengths, Lengths]) -> Clip:
    """Raises DataError where the row cannot be trained on, with the reason."""
    samples, rate = decode(raw)
    problem = words.problem(labels)
    if problem:
        raise DataError(problem)
    values = hearing.features(resample(samples, rate, hearing.rate))
    if not bool(values.isfinite().all()):
        raise DataError("its features are not finite")
    frames, hidden = (count_frames(count, values) for count in lengths)
    needed = len(labels) + sum(a == b for a, b in pairwise(labels))  # CTC puts a blank between equal labels
    if needed > frames:
        raise DataError(f"more labels than frames: its text needs {needed} frames, the clip has {frames}")
    return Clip(np.asarray(labels, dtype=np.int64), len(values), hidden, frames)


def _unknown_warnings(parts: Sequence[Rows], words: Words) -> list[str]:
    """One line where texts hold what the tokenizer does not know.

    Raises:
        DataError: it is more than half of all characters, as when the text is of another case or alphabet.
    """
    texts = [text for rows in parts for (text,) in rows.texts]
    unknown = words.unknown(set(texts))
    if not unknown:
        return []
    counted = Counter(one for text in texts for one in text if not one.isspace())
    lost, total = sum(counted[one] for one in unknown), counted.total()
    shown = ", ".join(repr(one) for one in sorted(unknown, key=lambda one: -counted[one])[:12])
    if 2 * lost > total:
        raise DataError(
            f"the checkpoint's tokenizer does not know {lost} of {total} characters of the texts ({shown}): are they in the "
            "case and alphabet that it was trained with? Convert them"
        )
    return [
        f"{lost} of {total} characters of the texts are unknown to the tokenizer ({shown}): they train as its unknown token, "
        "and count as errors"
    ]
