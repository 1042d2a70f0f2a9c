"""Clips of different lengths as a model's inputs: read, padded, masked, and given to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dsd_refine.data.reading import Table
from dsd_refine.forward import logits_of
from dsd_refine.tasks.inputs.audio import FeatureExtractor, Samples, SpecAugment, hear_again

Inputs = dict[str, torch.Tensor]


def hold_samples(table: Table, row: int, samples: Samples) -> None:
    """Hold a row's decoded sound for the run, if the table has a place for it."""
    if table.decoded is not None:
        table.decoded.put(row, samples.tobytes(), len(samples), 0)


def features_of(extractor: FeatureExtractor, table: Table, name: str, row: int) -> torch.Tensor:
    """The features of a row's clip in the column `name`: of the held sound, or of the file read again."""
    return extractor.features(hear_again(table, name, row, extractor.rate))


def clip_inputs(
    extractor: FeatureExtractor,
    augment: SpecAugment | None,
    features: Sequence[torch.Tensor],
    hidden: Sequence[int],
    seeds: Sequence[int | None],
) -> Inputs:
    """The model's inputs for clips, padded to the longest one.

    If all clips have a seed, SpecAugment's masks `mask_time_indices` (bool, clips x frames) are added,
    where the model takes them.

    Args:
        extractor: The checkpoint's feature extractor.
        augment: SpecAugment as the checkpoint's config has it, or None.
        features: Of each clip.
        hidden: The frames that SpecAugment may mask, of each clip.
        seeds: Of each clip's augmentation; None: as in evaluation.
    """
    inputs = {extractor.name: extractor.padded(features)}
    if extractor.masked:
        length = torch.tensor([len(values) for values in features])
        inputs["attention_mask"] = (torch.arange(int(length.max())) < length[:, None]).long()
    if augment is not None and all(seed is not None for seed in seeds):
        masks = [augment.draw(frames, int(seed or 0)) for frames, seed in zip(hidden, seeds, strict=True)]
        inputs["mask_time_indices"] = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return inputs


def logits_of_clips(
    forward: Callable[..., Any], extractor: FeatureExtractor, inputs: Inputs, aside: Mapping[str, torch.Tensor]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pairs of rows and their logits.

    A model without mask is given clips of one length at a time, without padding: so its logits of a
    clip do not depend on the others, in evaluation and in training.

    Args:
        forward: The model.
        extractor: The checkpoint's feature extractor.
        inputs: What `clip_inputs` returns.
        aside: int64 vectors with one entry per clip: the `length` of its input, and the `hidden` frames
            that SpecAugment may mask.
    """
    lengths = aside["length"].tolist()
    if extractor.masked:
        yield list(range(len(lengths))), logits_of(forward, inputs)
        return
    for length in dict.fromkeys(lengths):
        rows = [row for row, other in enumerate(lengths) if other == length]
        alike = {extractor.name: inputs[extractor.name][rows].narrow(extractor.axis, 0, length)}
        if "mask_time_indices" in inputs:
            alike["mask_time_indices"] = inputs["mask_time_indices"][rows, : int(aside["hidden"][rows[0]])]
        yield rows, logits_of(forward, alike)
