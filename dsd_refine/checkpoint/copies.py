"""Which files of a source are known copies of its weights: an output does not have them, for they would be stale.

Everything else beside the weights is the checkpoint's, whatever its ending: a decoder's `5gram.bin`, a module's own weights
in a folder of its own, an adapter for another language, a scaler in `normalizer.ckpt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

# Folders that hold the whole model once more: exports, the publisher's own format, the states of its training.
FOLDERS = (
    "onnx", "openvino", "coreml", "gguf", "mlx", "metal", "tflite", "saved_model", "tf_saved_model", "checkpoint-*",
)  # fmt: skip

# Patterns of paths relative to the source's folder, in lower case; as in fnmatch, `*` crosses `/`.
COPIES = (
    "model.*.safetensors", "model-*-of-*.safetensors",
    "model.*.safetensors.index.json", "model.safetensors.index.*.json",
    "pytorch_model*.bin", "pytorch_model*.bin.index*.json",
    "open_clip_*.bin", "open_clip_*.safetensors",
    "consolidated.*", "consolidated-*", "original/consolidated*", "original/*.safetensors", "original/*.pth",
    "tf_model*.h5", "tf_model*.h5.index.json", "model.h5", "model.weights.h5", "*.keras", "saved_model.pb", "*.tflite",
    "model.ckpt-*", "*.ckpt.data-*", "*.ckpt.index", "*.ckpt.meta",
    "flax_model*.msgpack", "flax_model*.msgpack.index.json", "*.ot",
    "*.onnx", "*.onnx_data*", "*.onnx.data", "openvino_*.xml", "openvino_*.bin",
    "*.mlmodel", "*.mlpackage/*", "*.mlmodelc/*",
    "*.gguf", "*.ggml", "ggml-*.bin", "export.pkl",
    *(f"{folder}/*" for folder in FOLDERS),
)  # fmt: skip

# Endings that say nothing: weights, or a scaler, a vocabulary, a head. Beside the weights their name or their size tells.
READ_PICKLES = (".pth", ".pt", ".pth.tar")  # which may also be what is read
LOOSE = (*READ_PICKLES, ".ckpt", ".pkl", ".npz", ".h5", ".safetensors")
STEMS = (
    "model", "pytorch_model", "model_best", "best", "best_model", "last", "latest", "weights", "weights.*", "model_weights",
    "state_dict", "model_state_dict", "ema", "model_ema", "checkpoint*", "ckpt*", "epoch*",
)  # fmt: skip

# What training would go on from, of the old weights: transformers' and accelerate's.
TRAINERS = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "rng_state*.pth", "random_states_*.pkl")


def is_weights(name: str) -> bool:
    """Is the file of this name, relative to the source's folder, a known copy of the weights, or a trainer's state?"""
    lower = name.lower()
    patterns: tuple[str, ...] = COPIES
    if "/" not in name:
        patterns = (*COPIES, *TRAINERS, *(f"{stem}{_loose(lower)}" for stem in STEMS if _loose(lower)))
    return any(fnmatchcase(lower, pattern) for pattern in patterns)


def is_as_large(name: str, size: int, weights: int) -> bool:
    """Has a file beside the weights, of an ending that weights may have, half as many bytes as they: fp16 of float32?"""
    if "/" in name or name.startswith("adapter") or not _loose(name.lower()):
        return False
    return 0 < weights <= 2 * size


def may_be_weights(name: str) -> bool:
    """Could the file of this name hold weights, by its name or its ending?"""
    return is_weights(name) or ("/" not in name and bool(_loose(name.lower())))


def _loose(lower: str) -> str | None:
    """The longest of the endings that say nothing."""
    return max((ending for ending in LOOSE if lower.endswith(ending)), key=len, default=None)


def shown_folder(name: str) -> str | None:
    """The folder that is named in place of its many files, where all of them are left out (`onnx/`)."""
    top, _, rest = name.partition("/")
    return f"{top}/" if rest and any(fnmatchcase(top.lower(), folder) for folder in FOLDERS) else None


# Formats that nobody trains in, by the ending of their files.
FORMATS = {
    ".gguf": "GGUF", ".ggml": "GGML", ".onnx": "ONNX", ".h5": "TensorFlow", ".keras": "Keras", ".pb": "TensorFlow",
    ".tflite": "TensorFlow Lite", ".msgpack": "Flax", ".ot": "Rust", ".npz": "NumPy, as of MLX or JAX", ".mlmodel": "Core ML",
}  # fmt: skip


def other_formats(names: Iterable[str]) -> str | None:
    """What to say of weights in formats that cannot be read here, and what is needed instead; None: there are none."""
    known = ((name, FORMATS.get(PurePosixPath(name).suffix.lower())) for name in sorted(names))
    firsts: dict[str, str] = {}
    for name, kind in known:
        if kind:
            firsts.setdefault(kind, name)
    if not firsts:
        return None
    found = ", ".join(f"{name} ({kind})" for kind, name in firsts.items())
    return (
        f"found {found}: give the checkpoint that it was exported from, in transformers' or timm's layout "
        "(config.json and model.safetensors)"
    )


def adapter_of(folder: Path, names: Iterable[str]) -> str | None:
    """What peft's files in a folder are (`a LoRA adapter of org/base`); None: there are none."""
    if "adapter_config.json" not in names:
        return None
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes()[:1_000_000])
    except (OSError, ValueError, RecursionError):
        config = None
    config = config if isinstance(config, dict) else {}
    kind = str(config.get("peft_type") or "peft").replace("LORA", "LoRA")
    base = config.get("base_model_name_or_path")
    return f"a {kind:.20} adapter of {base if isinstance(base, str) and base else 'another model':.200}"
