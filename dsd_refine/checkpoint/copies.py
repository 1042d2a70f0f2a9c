"""Recognise copies of a source's weights.

An output does not have them, because they would be outdated.

Every other file beside the weights belongs to the checkpoint, whatever its ending. Examples are a
decoder's `5gram.bin`, the weights of a module in its own folder, an adapter for another language,
and a scaler in `normalizer.ckpt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

# Folders that hold the whole model again: exports, the publisher's own format, training states.
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

# Ambiguous endings: the file may hold weights, or a scaler, a vocabulary, a head. Its name or size
# decides.
READ_PICKLES = (".pth", ".pt", ".pth.tar")  # a file with one of these may be the source's weight file
LOOSE = (*READ_PICKLES, ".ckpt", ".pkl", ".npz", ".h5", ".safetensors")
STEMS = (
    "model", "pytorch_model", "model_best", "best", "best_model", "last", "latest", "weights", "weights.*", "model_weights",
    "state_dict", "model_state_dict", "ema", "model_ema", "checkpoint*", "ckpt*", "epoch*",
)  # fmt: skip

# Training states of transformers and accelerate, which belong to the old weights.
TRAINERS = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "rng_state*.pth", "random_states_*.pkl")


def is_weights(name: str) -> bool:
    """Return whether a file is a known copy of the weights, or a training state.

    `name` is relative to the source's folder.
    """
    lower = name.lower()
    patterns: tuple[str, ...] = COPIES
    if "/" not in name:
        patterns = (*COPIES, *TRAINERS, *(f"{stem}{_ambiguous(lower)}" for stem in STEMS if _ambiguous(lower)))
    return any(fnmatchcase(lower, pattern) for pattern in patterns)


def is_as_large(name: str, size: int, weights: int) -> bool:
    """Return whether a file's ending and size say that it is a copy of the weights.

    It is one if it has at least half as many bytes: float16 has half as many as float32. `size` and
    `weights` are bytes, of the file and of all weight files.
    """
    if "/" in name or name.startswith("adapter") or not _ambiguous(name.lower()):
        return False
    return 0 < weights <= 2 * size


def may_be_weights(name: str) -> bool:
    """Return whether a file may hold weights, by its name or its ending."""
    return is_weights(name) or ("/" not in name and bool(_ambiguous(name.lower())))


def _ambiguous(lower: str) -> str | None:
    """The longest ambiguous ending of a name in lower case; None if it has none."""
    return max((ending for ending in LOOSE if lower.endswith(ending)), key=len, default=None)


def shown_folder(name: str) -> str | None:
    """Return the folder to name in a message in place of its many files (`onnx/`), or None."""
    top, _, rest = name.partition("/")
    return f"{top}/" if rest and any(fnmatchcase(top.lower(), folder) for folder in FOLDERS) else None


# Formats that cannot be trained here, by the ending of their files.
FORMATS = {
    ".gguf": "GGUF", ".ggml": "GGML", ".onnx": "ONNX", ".h5": "TensorFlow", ".keras": "Keras", ".pb": "TensorFlow",
    ".tflite": "TensorFlow Lite", ".msgpack": "Flax", ".ot": "Rust", ".npz": "NumPy, as of MLX or JAX", ".mlmodel": "Core ML",
}  # fmt: skip


def other_formats(names: Iterable[str]) -> str | None:
    """Describe weights in formats that cannot be read here, and say what is needed.

    None: there are none.
    """
    known = ((name, FORMATS.get(PurePosixPath(name).suffix.lower())) for name in sorted(names))
    firsts: dict[str, str] = {}
    for name, kind in known:
        if kind:
            firsts.setdefault(kind, name)
    if not firsts:
        return None
    files = ", ".join(f"{name} ({kind})" for kind, name in firsts.items())
    return (
        f"found {files}: give the checkpoint that it was exported from, in transformers' or timm's layout "
        "(config.json and model.safetensors)"
    )


# how peft puts an adapter into the weights of its model
MERGE = "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)"


def adapter_of(folder: Path, names: Iterable[str]) -> str | None:
    """Describe the adapter that peft saved in a folder (`a LoRA adapter of org/base`).

    None: there is none.
    """
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
