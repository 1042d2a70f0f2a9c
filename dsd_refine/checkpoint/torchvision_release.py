"""torchvision's released weights: it releases bare `.pth` files, and what they are is written in
its weights enums.

Our layout of a folder is such an entry put into config.json beside the weights, so that an output
can be refined and verified again.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision import models

from dsd_refine.errors import CheckpointError

# what torchvision's own builders set for released weights, and a bare `get_model(name)` does not
RELEASED_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


def entry(name: str) -> tuple[str, Any]:
    """(architecture, member of its weights enum) that `NAME` or `NAME.TAG` means; without a tag
    torchvision's default.

    Raises:
        CheckpointError: no such classification model, or no such weights of it, with the nearest or
            all names.
    """
    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CheckpointError(f"torchvision {torchvision.__version__} has no classification model {architecture!r}{hint}")
    members = models.get_model_weights(architecture)
    if tag and tag not in members.__members__:
        tags = ", ".join(members.__members__) or "none"
        raise CheckpointError(f"{architecture}: torchvision has no weights {tag!r} of it, but {tags}")
    if not tag and "DEFAULT" not in members.__members__:
        raise CheckpointError(f"{architecture}: torchvision knows the architecture but no released weights of it")
    member = members[tag or "DEFAULT"]
    if not member.meta["categories"]:
        raise CheckpointError(f"{name}: these weights have no classifier; there is nothing to refine")
    return architecture, member


def describe(architecture: str, weights: Any) -> dict[str, Any]:
    """config.json of a released weights entry."""
    transforms = weights.transforms()
    args = dict(RELEASED_ARGS.get(architecture, {}))
    if architecture.startswith("vit_"):
        args["image_size"] = weights.meta["min_size"][0]
    return {
        "library": "torchvision",
        "architecture": architecture,
        "weights": weights.name,
        "num_classes": len(weights.meta["categories"]),
        "args": args,
        "preprocessing": {
            "resize_size": transforms.resize_size[0],
            "crop_size": transforms.crop_size[0],
            "mean": list(transforms.mean),
            "std": list(transforms.std),
            "interpolation": transforms.interpolation.value,
        },
        "label_names": list(weights.meta["categories"]),
    }


def describe_in(folder: Path, architecture: str, weights: Any) -> str:
    """Write the config.json of a weights entry into `folder`.

    Returns the hash that torchvision puts into the file's name (the file's name where it has none).
    """
    text = json.dumps(describe(architecture, weights), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    name, digest = _file_of(weights)
    return digest or name


def link_weights(folder: Path, weights: Any) -> None:
    """Put a link into `folder` to the weights in torch.hub's cache; they are downloaded if needed.

    Raises:
        CheckpointError: the file is not in the cache and cannot be downloaded.
    """
    name, digest = _file_of(weights)
    if not (folder / name).exists():
        (folder / name).symlink_to(_cached(weights.url, name, digest))


def _file_of(weights: Any) -> tuple[str, str | None]:
    """Name of a weights entry's file, and the start of its SHA-256 that the name holds."""
    name = weights.url.rsplit("/", 1)[-1]
    hashed = re.search(r"-([a-f0-9]{8,})\.", name)
    return name, hashed[1] if hashed else None


def _cached(url: str, name: str, digest: str | None) -> Path:
    """The file in torch.hub's cache (TORCH_HOME), where torch.hub itself would put it; nothing in
    it is read.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", name).absolute()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), digest, progress=False)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: not in torch.hub's cache, and not to be downloaded from torchvision ({error}). Fetch it where there is a "
            f"network, put it into {path.parent} (TORCH_HOME names another place), or give a local directory"
        ) from None
    return path
