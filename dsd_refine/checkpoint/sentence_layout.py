"""The layout of sentence-transformers: which modules make an embedding of the encoder's outputs, and their settings.

The encoder's own files lie at the top of the folder, in transformers' layout. The other modules have
a folder each (`1_Pooling`, `2_Dense`, …). `modules.json` lists them in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from dsd_refine.checkpoint.safetensors_file import read_header, read_json, read_json_list
from dsd_refine.errors import CheckpointError

MODULES = "modules.json"
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")  # in the order of their joined outputs
OLD_FIELDS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid")
SETTINGS = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json",
            "sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json",
            "sentence_xlnet_config.json")  # fmt: skip
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling: float32 weight (out, in), bias (out,) or None, and the name of a class in torch.nn."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str


@dataclass(frozen=True)
class SentenceLayout:
    """How a checkpoint makes an embedding.

    Attributes:
        poolings: Of `POOLINGS`; the outputs of several are joined.
        steps: What comes after the pooling: a `Dense`, or None for a scaling to length 1.
        include_prompt: False: the tokens of a prompt are left out of the pooling.
        max_length: The most tokens of a text. None: the checkpoint does not say.
        lower: Texts are written in lower case before the tokenizer reads them.
        prompts: What is put before a text, by name.
        default_prompt: The name of the prompt of texts that nothing else is known of.
        similarity: `cosine` or `dot`: how two embeddings are compared.
    """

    poolings: tuple[str, ...]
    steps: tuple[Dense | None, ...] = ()
    include_prompt: bool = True
    max_length: int | None = None
    lower: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"

    @property
    def shown(self) -> str:
        """The modules behind the encoder, for the report."""
        steps = [
            "normalize" if step is None else f"dense {step.weight.shape[1]} to {step.weight.shape[0]}" for step in self.steps
        ]
        return ", ".join([f"{'+'.join(self.poolings)} pooling", *steps])


def is_sentence_model(folder: Path) -> bool:
    """Return whether `modules.json` says that the folder's model makes embeddings of texts.

    A cross-encoder's has no pooling.
    """
    if not (folder / MODULES).is_file():
        return False
    return any(kind.endswith("Pooling") for kind, _ in _modules(folder))


def read_sentence_layout(folder: Path) -> SentenceLayout | None:
    """Read a folder's modules and settings; None if it has no `modules.json`.

    Raises:
        CheckpointError: A module that is not supported, a file of it that is missing or cannot be used.
    """
    if not (folder / MODULES).is_file():
        return None
    (first, place), *others = _modules(folder)
    if first != "Transformer" or place:
        raise CheckpointError(
            f"{folder / MODULES}: the first module is {first!r} in {place or '.'!r}; supported is a Transformer at the top of "
            "the folder"
        )
    if not others or others[0][0] != "Pooling":
        named = others[0][0] if others else "nothing"
        raise CheckpointError(f"{folder / MODULES}: a Pooling must come after the Transformer, and {named} does")
    pooling = _settings(folder / others[0][1] / "config.json")
    steps = [_step(folder, kind, path) for kind, path in others[1:] if kind != "Dropout"]
    texts = next((read_json(folder / name) for name in SETTINGS if (folder / name).is_file()), {})
    model = (
        read_json(folder / "config_sentence_transformers.json")
        if (folder / "config_sentence_transformers.json").is_file()
        else {}
    )
    similarity = model.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(f"{folder}: compares embeddings by {similarity!r}; supported are {', '.join(SIMILARITIES)}")
    limit = texts.get("max_seq_length")
    return SentenceLayout(
        poolings=_poolings(folder / others[0][1] / "config.json", pooling),
        steps=tuple(steps),
        include_prompt=pooling.get("include_prompt", True) is not False,
        max_length=limit if isinstance(limit, int) and limit > 0 else None,
        lower=texts.get("do_lower_case") is True,
        prompts={str(name): text for name, text in (model.get("prompts") or {}).items() if isinstance(text, str) and text},
        default_prompt=model.get("default_prompt_name"),
        similarity=similarity,
    )


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class, folder) of each module, in order.

    Raises:
        CheckpointError: The file is no list of modules; a folder is none of the checkpoint's; or the model is
            one of those of sentence-transformers that make no single embedding.
    """
    file = folder / MODULES
    found = []
    for module in read_json_list(file):
        kind, path = (module.get("type"), module.get("path", "")) if isinstance(module, dict) else (None, "")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise CheckpointError(f"{file}: a module has no `type` and `path`")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise CheckpointError(f"{file}: names the folder {path!r:.200} outside its own; refused")
        for package, name in (
            ("sparse_encoder", "sparse embeddings (SPLADE)"),
            ("multi_vector", "an embedding a token (ColBERT)"),
        ):
            if package in kind:
                raise CheckpointError(
                    f"{file}: the model makes {name}, which are not supported; supported is one dense embedding a text"
                )
        found.append((kind.rpartition(".")[2], path))
    if not found:
        raise CheckpointError(f"{file}: lists no module")
    return found


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing, and {MODULES} names its folder; was the download completed?")
    return read_json(file)


def _poolings(file: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The poolings that a config asks for, in its newer field or in its older ones; mean where it says nothing."""
    asked = config.get("pooling_mode")
    if asked is None:
        return tuple(mode for mode in POOLINGS if config.get(OLD_FIELDS[mode])) or ("mean",)
    modes = tuple(asked) if isinstance(asked, list) else (asked,)
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown or not modes:
        raise CheckpointError(f"{file}: no pooling {', '.join(map(repr, unknown))}; known are {', '.join(POOLINGS)}")
    return modes


def _step(folder: Path, kind: str, path: str) -> Dense | None:
    """A module behind the pooling."""
    if kind == "Normalize":
        return None
    if kind == "Dense":
        return _dense(folder / path)
    raise CheckpointError(
        f"{folder / MODULES}: the module {kind} ({path}) is not supported; supported are Transformer, Pooling, Normalize, Dense"
    )


def _dense(folder: Path) -> Dense:
    """The linear layer in a folder."""
    config = _settings(folder / "config.json")
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    package, _, activation = name.rpartition(".")
    if activation not in ACTIVATIONS or not package.startswith("torch.nn"):
        raise CheckpointError(f"{folder}: the activation {name:.100} is not supported; supported are {', '.join(ACTIVATIONS)}")
    place = config.get("module_input_name") or "sentence_embedding"
    if config.get("use_residual") or {place, config.get("module_output_name") or place} != {"sentence_embedding"}:
        raise CheckpointError(f"{folder}: a Dense with a residual, or of something else than the embedding, is not supported")
    file = folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: has no model.safetensors. Save the model once with sentence-transformers "
            "(SentenceTransformer(…).save_pretrained), which writes one"
        )
    tensors = {entry.name: header.tensor(entry).float() for header in [read_header(file)] for entry in header.entries}
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise CheckpointError(f"{file}: holds no `linear.weight` of two dimensions with a bias that fits")
    return Dense(weight, bias, activation)
