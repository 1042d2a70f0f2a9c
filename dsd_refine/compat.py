"""Every private or undocumented name of a library that this package uses, in one place.

A release of a library may remove such a name without notice. Each has the reason why it is used,
and what to use if it goes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

# The common base of BatchNorm1d/2d/3d, SyncBatchNorm and the lazy ones. timm's and transformers'
# own BatchNorm classes derive from it. If it goes: the tuple of the public classes.
BatchNorm = _BatchNorm

# The common base of Conv1d/2d/3d and ConvTranspose1d/2d/3d. If it goes: the tuple of these six.
Convolution = _ConvNd

# The common base of Dropout, Dropout1d/2d/3d and AlphaDropout. If it goes: the tuple of these.
DropoutLayer = _DropoutNd


def multiply_in_place(tensors: list[torch.Tensor], factors: list[torch.Tensor]) -> None:
    """Multiply each tensor by its factor, in place, with one kernel for many tensors.

    torch's own optimizers use this function, which has no public name. If it goes: a loop of
    `mul_`.
    """
    torch._foreach_mul_(tensors, factors)


def not_compiled(model: Any) -> Any:
    """Return the module that `torch.compile` wrapped, or `model` itself if it is not compiled.

    torch gives the wrapped module no public name. If it goes:
    `accelerate.utils.extract_model_from_parallel(model, keep_torch_compile=False)`.
    """
    return getattr(model, "_orig_mod", model)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters that the module itself registers, by attribute.

    A parameter without a value is None. `named_parameters(recurse=False)` leaves these out. If
    `_parameters` goes: use that.
    """
    return module._parameters


def card_infos(card_data: Any) -> dict[str, Any]:
    """Return the `dataset_info` of a data set's card, by configuration.

    `datasets` reads cards with this class, but does not document it. If it goes: the entry
    `dataset_info` of the card, with `datasets.Features` made from its `features`.
    """
    from datasets.info import DatasetInfosDict

    return dict(DatasetInfosDict.from_dataset_card_data(card_data))


def card_configs(card_data: Any) -> dict[str, dict[str, Any]]:
    """Return the configurations of a data set's card, each with its options.

    `datasets` reads cards with this class, but does not document it. If it goes: the entry
    `configs` of the card, whose items have a `config_name`.
    """
    from datasets.utils.metadata import MetadataConfigs

    return dict(MetadataConfigs.from_dataset_card_data(card_data))


def default_config(configs: dict[str, dict[str, Any]]) -> str | None:
    """Return the name of the default configuration of `card_configs`, or None.

    If the undocumented class goes: the only one, or the one called default, or the one marked
    `default`.
    """
    from datasets.utils.metadata import MetadataConfigs

    name: str | None = MetadataConfigs(configs).get_default_config_name()
    return name


def accelerate_states() -> list[dict[str, Any]]:
    """Return the dicts in which Accelerate keeps the state of the process.

    Accelerate has no public way to save and restore this state. If they go: two calls in one process
    must use the same device and precision.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]


def shifted_right(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return what the decoder of an encoder-decoder sees for these labels: a start, and all but the last one.

    It is the model's own function. transformers documents it for most families; the others (Whisper,
    M2M100) have it in their module. If that goes: the method `prepare_decoder_input_ids_from_labels`.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    shift = sys.modules[type(model).__module__].shift_tokens_right
    config = model.config
    moved: torch.Tensor = shift(labels, config.pad_token_id, config.decoder_start_token_id)
    return moved


def whisper_normalizer(kind: str, spelling: dict[str, str]) -> Any:
    """Return Whisper's `basic` or `english` normalizer of texts, a function from text to text.

    transformers documents it only as a part of Whisper's slow tokenizer. If it goes: the package
    `whisper-normalizer` has the same code.

    Args:
        kind: basic or english.
        spelling: British spellings and the American ones that replace them, for `english`.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    kinds: dict[str, Any] = {"basic": BasicTextNormalizer, "english": EnglishTextNormalizer}
    return kinds[kind]() if kind == "basic" else kinds[kind](spelling)
