"""Audio classification: clips of any rate and length, through the checkpoint's own feature extractor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import torch
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import AUDIO, LABEL, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined
from dsd_refine.data.tables import in_threads, raw_bytes, undecoded
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.tasks.base import Batch, Forward, Item, Tables, require
from dsd_refine.tasks.classification import Classification, LabelledPart, labelled_parts, overlap_warning, skip_warnings
from dsd_refine.tasks.inputs.audio import (
    FeatureExtractor,
    Lengths,
    SpecAugment,
    count_frames,
    decode,
    lengths_of,
    most_samples,
    open_feature_extractor,
    resample,
    spec_augment,
)
from dsd_refine.tasks.inputs.clips import clip_inputs, features_of, hold_samples, logits_of_clips


class AudioClassification(Classification):
    """`audio-classification` for transformers models."""

    name = "audio-classification"
    draws: ClassVar[bool] = True
    extractor: FeatureExtractor
    augment: SpecAugment | None
    hidden: Lengths
    audio_column: str

    def batch(self, part: LabelledPart, items: Sequence[Item]) -> Batch:
        """Decode and resample the clips, compute their features, and pad them to the longest clip.

        If all items have a seed, the masks in time of the checkpoint's SpecAugment are added, where the
        model takes them. The targets are int64 class ids, one per clip. `aside` has two int64 vectors:
        the `length` of each clip's input, and the `hidden` frames that SpecAugment may mask.
        """
        table, numbers = part.rows.table, [int(part.rows.numbers[unit]) for unit, _ in items]
        features = [features_of(self.extractor, table, self.audio_column, number) for number in numbers]
        hidden = [count_frames(self.hidden, values) for values in features]
        inputs = clip_inputs(self.extractor, self.augment, features, hidden, [seed for _, seed in items])
        aside = {"length": torch.tensor([len(values) for values in features]), "hidden": torch.tensor(hidden)}
        targets = torch.as_tensor(part.ids[[unit for unit, _ in items]])
        return Batch(inputs, targets, len(items), aside)

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Clips x classes."""
        pairs = list(logits_of_clips(forward, self.extractor, batch.inputs, batch.aside))
        order = torch.tensor([row for rows, _ in pairs for row in rows])
        return torch.cat([logits for _, logits in pairs])[order.argsort()]

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy of the clips, a float32 scalar."""
        return F.cross_entropy(self.logits(forward, batch), batch.targets, reduction="sum")

    def report(self) -> Mapping[str, Any]:
        """As in `Classification`, and the settings of the feature extraction."""
        preprocessing = {
            "feature_extractor": type(self.extractor.extractor).__name__, "sampling_rate": self.extractor.rate,
            "resampling": "scipy.signal.resample_poly", "attention_mask": self.extractor.masked,
            "spec_augment": self.augment is not None,
        }  # fmt: skip
        return {**super().report(), "preprocessing": preprocessing}


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> AudioClassification:
    """The task on these clips, with the checkpoint's own feature extractor and class names.

    Raises:
        UsageError: the packages for audio are not installed.
        CheckpointError: the checkpoint has no usable feature extractor.
        DataError: no audio or label column, no usable rows, labels that do not match.
    """
    require("audio-classification", "speech", "soundfile")
    extractor = open_feature_extractor(library.folder, model, library.trust_remote_code, one_answer=True)
    first = next(iter(tables.values()))
    audio = column(first, recipe.audio_column, AUDIO)
    tables = {name: undecoded(table, audio, datasets.Audio) for name, table in tables.items()}
    evaluation = {name: undecoded(t, audio, datasets.Audio) for name, t in evaluation.items()} if evaluation else None
    examiner = _Examiner(extractor, audio)
    aliases, classes = library.label_names()
    matched, parts, divided = labelled_parts(
        tables, evaluation, lambda table: column(table, recipe.label_column, LABEL), examiner.examine,
        aliases, classes, recipe.holdout, recipe.label_map,
    )  # fmt: skip
    train, holdout, judge = parts
    warnings = overlap_warning(divided) + skip_warnings(divided) + examiner.warnings()
    task = AudioClassification(matched, train, holdout, judge, warnings)  # type: ignore[arg-type]
    task.decide_by(recipe.metric)
    task.extractor, task.audio_column = extractor, audio
    task.augment, task.hidden = spec_augment(model), lengths_of(model, one_answer=True)[1]
    return task


class _Examiner:
    """Reads every clip once."""

    def __init__(self, extractor: FeatureExtractor, audio: str) -> None:
        self.extractor, self.audio, self.most = extractor, audio, most_samples(extractor)
        self.rows, self.cut = 0, 0

    def examine(self, table: Table, labels: list[str | None]) -> list[Examined]:
        """What each row is."""
        examined = in_threads(lambda row: self._row(table, row, labels[row]), len(labels))
        self.rows += sum(row.reason is None for row, _ in examined)
        self.cut += sum(is_cut for row, is_cut in examined if row.reason is None)
        return [row for row, _ in examined]

    def _row(self, table: Table, row: int, label: str | None) -> tuple[Examined, bool]:
        """The row, and whether the extractor cuts its clip."""
        if label is None:
            return Examined(b"", None, "no label"), False
        try:
            raw = raw_bytes(table, self.audio, row)
            samples = resample(*decode(raw), self.extractor.rate)
            if not bool(self.extractor.features(samples).isfinite().all()):
                raise DataError("its features are not finite")
        except OSError as error:
            return Examined(b"", label, f"unreadable file ({error.strerror or error})"), False
        except (DataError, TypeError) as error:
            return Examined(b"", label, str(error) if isinstance(error, DataError) else "no audio"), False
        hold_samples(table, row, samples)
        return Examined(hashlib.sha256(raw).digest(), label, length=len(samples)), self.most is not None and len(
            samples
        ) > self.most

    def warnings(self) -> list[str]:
        """What is to be said of the clips."""
        if not self.cut or self.most is None:
            return []
        return [
            f"{self.cut:,} of {self.rows:,} clips are longer than {self.most / self.extractor.rate:.2f} s: the checkpoint's "
            "feature extractor cuts the rest off"
        ]


def is_sound(table: Table, names: Sequence[str], row: int) -> bool:
    """Can a row's clip be read?"""
    (audio,) = names
    try:
        decode(raw_bytes(undecoded(table, audio, datasets.Audio), audio, row))
    except (OSError, DataError, TypeError):
        return False
    return True
