"""Speech recognition and translation by encoder-decoders: Whisper and Speech2Text.

A clip of any rate goes through the checkpoint's own feature extractor. Whisper hears 30 seconds: longer
clips are skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import datasets
import numpy as np
import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.compat import whisper_normalizer
from dsd_refine.data.columns import AUDIO, TRANSCRIPT, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import in_threads, undecoded
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import TASKS
from dsd_refine.tasks.base import Batch, Tables, choose_metric, require
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.encoder_decoder import Array, EncoderDecoder, TargetPart
from dsd_refine.tasks.inputs.audio import (
    FeatureExtractor,
    Samples,
    hear,
    lengths_of,
    load_feature_extractor,
    shortest_clip,
)
from dsd_refine.tasks.inputs.clips import features_of, hold_samples
from dsd_refine.tasks.inputs.texts import no_text
from dsd_refine.tasks.inputs.tokens import Unknown, beyond_warnings, load_tokenizer, or_reason
from dsd_refine.tasks.inputs.writer import TextWriter, has_limit, open_writer, shift
from dsd_refine.tasks.text_metrics import character_errors, word_errors

METRICS = ("wer", "cer", "loss")


@dataclass
class SpeechSeq2Seq(EncoderDecoder):
    """`speech-seq2seq` for transformers models.

    `stats` are word edits, words, character edits, characters, and the number of targets. `score` and
    `count` are the edits and the length of the metric that decides.
    """

    extractor: FeatureExtractor = field(kw_only=True)
    audio_column: str = field(kw_only=True)
    normalizer: Callable[[str], str] | None = None
    normalizer_name: str | None = None
    name: ClassVar[str] = "speech-seq2seq"
    trivial: ClassVar[str] = "hearing nothing"

    @property
    def width(self) -> int:
        """The number of sums of a transcript."""
        return 4

    @property
    def corpus(self) -> Callable[[Array], Array] | None:
        """None: error rates are ratios of sums."""
        return None

    def encoder_inputs(self, part: TargetPart, units: Sequence[int]) -> dict[str, torch.Tensor]:
        """The features of the clips, float32: rows x mels x frames for Whisper, rows x frames x mels and their
        mask for Speech2Text.
        """
        clips = [self._features(part, unit) for unit in units]
        inputs = {self.extractor.name: self.extractor.padded(clips)}
        if self.extractor.masked:
            lengths = torch.tensor([[len(clip)] for clip in clips])
            inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths).long()
        return inputs

    def grouped(self, batch: Batch) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        """Clips of one length together, without padding: Speech2Text's convolutions come before its mask, and let
        padding leak into the end of a clip. Whisper's clips all have one length.
        """
        if not self.extractor.masked:
            return super().grouped(batch)
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        groups = []
        for length in dict.fromkeys(lengths):
            rows = [row for row, other in enumerate(lengths) if other == length]
            inputs = {name: value[rows] for name, value in batch.inputs.items()}
            cut = {name: inputs[name][:, :length] for name in (self.extractor.name, "attention_mask")}
            groups.append((rows, inputs | cut))
        return groups

    def _features(self, part: TargetPart, unit: int) -> torch.Tensor:
        row = int(part.rows.numbers[unit])
        return features_of(self.extractor, part.rows.table, self.audio_column, row)

    def measure(self, references: Sequence[str], text: str) -> tuple[float, ...]:
        """(word edits, words, character edits, characters) of a transcript, both sides normalized."""
        wanted, written = self._normalized(references[0]), self._normalized(text)
        return (*word_errors(wanted, written), *character_errors(wanted, written))

    def _normalized(self, text: str) -> str:
        return self.normalizer(text).strip() if self.normalizer is not None else text

    def row_value(self, sums: Sequence[float]) -> tuple[float, float]:
        """Edits and length: of characters where `cer` decides, else of words."""
        return (sums[2], sums[3]) if self.metric == "cer" else (sums[0], sums[1])

    def written_metrics(self, sums: Array) -> dict[str, float]:
        """Word and character error rate."""
        return {"wer": float(sums[0] / max(1, sums[1])), "cer": float(sums[2] / max(1, sums[3]))}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """As in `EncoderDecoder`, with the settings of the feature extraction and the normalizer."""
        own = {
            "feature_extractor": type(self.extractor.extractor).__name__, "sampling_rate": self.extractor.rate,
            "resampling": "scipy.signal.resample_poly", "attention_mask": self.extractor.masked,
        }  # fmt: skip
        normalizer = {"normalizer": self.normalizer_name} if self.normalizer_name else {}
        return {**own, **normalizer, **super().preprocessing}


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> SpeechSeq2Seq:
    """The task on these clips, with the checkpoint's own tokenizer, feature extractor and generation config.

    Raises:
        DataError: no audio or text column, no usable rows, or a language that is not known.
        CheckpointError: the folder has no usable tokenizer or feature extractor.
        UsageError: the packages for audio are not installed.
    """
    metric = choose_metric("speech-seq2seq", recipe.metric, METRICS)
    require("speech-seq2seq", "speech", "soundfile", "jiwer")
    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    default = TASKS["speech-seq2seq"].default_length or 0
    writer = open_writer(library.folder, tokenizer, model, recipe.max_length, default, (None, recipe.target_language))
    extractor = _open_extractor(library, model)
    normalizer = _normalizer(recipe.normalizer, tokenizer)
    audio = column(next(iter(tables.values())), recipe.audio_column, AUDIO)
    examiner = _Examiner(writer, extractor, audio, recipe.text_column, normalizer)
    used = {name: examiner.examine(table) for name, table in tables.items()}
    judged = {name: examiner.examine(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    train, holdout, judge = (examiner.part(rows, model) for rows in (divided.train, divided.holdout, divided.eval))
    assert train is not None
    assert judge is not None
    if not has_limit(writer.generation):
        writer.generation.update(max_new_tokens=max(len(ids) for part in (train, judge) for ids in part.labels))
    noted = beyond_warnings(tokenizer, writer.size) + examiner.unknown.warnings()
    return SpeechSeq2Seq(
        train, holdout, judge, writer, metric, overlap_warning(divided) + skip_warnings(divided) + noted,
        extractor=extractor, audio_column=audio, normalizer=normalizer, normalizer_name=recipe.normalizer,
    )  # fmt: skip


def _open_extractor(library: Library, model: torch.nn.Module) -> FeatureExtractor:
    """Whisper's extractor pads each clip to its 30 seconds. Speech2Text is given a mask."""
    extractor, gives_mask = load_feature_extractor(library.folder, library.trust_remote_code)
    if hasattr(extractor.extractor, "n_samples"):
        return extractor
    if not gives_mask:
        raise CheckpointError(f"{library.folder}: its feature extractor gives no attention mask, which Speech2Text needs")
    return replace(extractor, masked=True, shortest=shortest_clip(extractor, lengths_of(model)[0]))


def _normalizer(kind: str | None, tokenizer: Any) -> Callable[[str], str] | None:
    if kind is None:
        return None
    spelling = getattr(tokenizer, "english_spelling_normalizer", None) or {}
    made: Callable[[str], str] = whisper_normalizer(kind, spelling)
    return made


class _Examiner:
    """Hears every clip once, and keeps the labels of the rows that can be used."""

    def __init__(
        self,
        writer: TextWriter,
        extractor: FeatureExtractor,
        audio: str,
        text: str | None,
        normalizer: Callable[[str], str] | None,
    ) -> None:
        self.writer, self.extractor, self.audio, self.text, self.normalizer = writer, extractor, audio, text, normalizer
        self.most = getattr(extractor.extractor, "n_samples", None)  # samples that the extractor keeps
        self.unknown = Unknown(writer.tokenizer)
        self.kept: dict[int, list[Array | None]] = {}  # id of a table -> labels of its rows

    def examine(self, table: Table) -> Rows:
        """The usable rows of a table. Equal sounds stay in one part, whatever is said of them."""
        table = undecoded(table, self.audio, datasets.Audio)
        texts = table.rows[column(table, self.text, TRANSCRIPT, [self.audio])][:]
        read = [or_reason(self._labels, text) for text in texts]  # not in threads: tokenizers do not like them
        self.kept[id(table)] = [labels for labels, _ in read]

        def examine_row(row: int) -> Examined:
            if read[row][1] is not None:
                return Examined(b"", reason=read[row][1])
            try:
                raw, samples = hear(table, self.audio, row, self.extractor.rate)
                self._check(samples)
            except DataError as error:
                return Examined(b"", reason=str(error))
            hold_samples(table, row, samples)
            return Examined(hashlib.sha256(raw).digest(), texts=(" ".join(texts[row].split()),))

        return use_rows(table, in_threads(examine_row, len(texts)))

    def _labels(self, text: Any) -> Array:
        """Raises DataError where the text cannot be learned, with the reason."""
        if no_text(text):
            raise DataError("no text")
        if self.normalizer is not None and not self.normalizer(text).strip():
            raise DataError("its text is empty once it is normalized")
        labels, is_cut = self.writer.labels(" ".join(text.split()))
        if is_cut:
            raise DataError(f"its text has more than {self.writer.most_labels} tokens")
        self.unknown.see(labels)
        return labels

    def _check(self, samples: Samples) -> None:
        if self.most is not None and len(samples) > self.most:
            rate = self.extractor.rate
            raise DataError(f"{len(samples) / rate:.1f} s long: the model hears {self.most / rate:g} s")
        if not bool(self.extractor.features(samples).isfinite().all()):
            raise DataError("its features are not finite")

    def part(self, rows: Rows | None, model: Any) -> TargetPart | None:
        """The rows with their labels."""
        if rows is None:
            return None
        labels = [ids for number in rows.numbers if (ids := self.kept[id(rows.table)][int(number)]) is not None]
        return TargetPart(rows, labels, [shift(model, np.asarray(ids)) for ids in labels])
