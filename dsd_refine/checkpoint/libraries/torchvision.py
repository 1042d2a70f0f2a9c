"""torchvision's classification models: a released weights entry, or a folder that says how its model is built.

torchvision releases bare `.pth` files; what they are is written in its code, in the entries of its weights enums. Our layout
of a folder is such an entry put into config.json beside the weights, so that an output can be refined and verified again:
`library: torchvision`, `architecture`, `weights` (the entry whose facts hold where the file says nothing), `num_classes`,
`label_names`, `args` (for `torchvision.models.get_model`) and `preprocessing`.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torchvision import models

from dsd_refine.checkpoint.libraries.skip_init import Undrawn
from dsd_refine.checkpoint.safetensors_file import listed, read_json
from dsd_refine.errors import CheckpointError

KEYS = ("library", "architecture", "weights", "num_classes", "label_names", "args", "preprocessing")
PREPROCESSING = ("resize_size", "crop_size", "mean", "std", "interpolation")
# what torchvision's own builders set for released weights, and a bare `get_model(name)` does not
RELEASED_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}

OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # names in the released DenseNet files
MNASNET_VERSION = 2  # a state dict without its `_metadata` (safetensors has none) is refused by MNASNet


def entry(name: str) -> tuple[str, Any]:
    """(architecture, member of its weights enum) that `NAME` or `NAME.TAG` means; without a tag torchvision's default.

    Raises:
        CheckpointError: no such classification model, or no such weights of it, with the nearest or all names.
    """
    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CheckpointError(f"torchvision {torchvision.__version__} has no classification model {architecture!r}{hint}")
    found = models.get_model_weights(architecture)
    if tag and tag not in found.__members__:
        tags = ", ".join(found.__members__) or "none"
        raise CheckpointError(f"{architecture}: torchvision has no weights {tag!r} of it, but {tags}")
    if not tag and "DEFAULT" not in found.__members__:
        raise CheckpointError(f"{architecture}: torchvision knows the architecture but no released weights of it")
    member = found[tag or "DEFAULT"]
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
    """Put a link to the weights in torch.hub's cache into `folder`; they are downloaded if needed.

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
    """The file in torch.hub's cache (TORCH_HOME), as torch.hub would have put it there, but read by nobody yet."""
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


@dataclass(frozen=True)
class TorchvisionLibrary:
    """A torchvision checkpoint folder. `args` go to the model's builder, `preprocessing` to torchvision's own transform."""

    folder: Path
    architecture: str
    num_classes: int
    label_names: tuple[str, ...] | None
    args: dict[str, Any]
    preprocessing: dict[str, Any]
    released: bool
    name: str = "torchvision"

    @classmethod
    def open(cls, folder: Path) -> TorchvisionLibrary:
        """Read config.json; what it leaves out is taken from the weights entry that it names.

        Raises:
            CheckpointError: an unknown key, architecture or entry, or neither an entry nor what it would say.
        """
        path = folder / "config.json"
        config = read_json(path)
        unknown = sorted(set(config) - set(KEYS))
        if unknown:
            raise CheckpointError(f"{path}: unknown keys {', '.join(unknown)}; a torchvision config has {', '.join(KEYS)}")
        architecture, tag = str(config.get("architecture")), config.get("weights")
        if architecture not in models.list_models(module=models):
            entry(architecture)  # says what is near
        whole = {**(describe(*entry(f"{architecture}.{tag}")) if tag else {}), **config}
        names = _names(path, whole, "label_names" in config)
        classes = whole.get("num_classes", len(names or ()))
        if not isinstance(classes, int) or classes < 1 or (names and len(names) != classes):
            raise CheckpointError(f"{path}: num_classes {classes!r} is no number of classes, or not that of label_names")
        return cls(folder, architecture, classes, names, _args(path, whole), _preprocessing(path, whole), bool(tag))

    @property
    def names(self) -> list[str]:
        """What a recipe's `models` globs are matched with."""
        return [self.architecture]

    @property
    def task(self) -> str:
        return "image-classification"

    def build_meta(self) -> torch.nn.Module:
        """The model without memory: shapes only."""
        with _building(self), init_empty_weights():  # torch.device("meta") would break RegNet, which computes its widths
            return self._built()

    def load(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
        """The model with the given tensors in it. Those that are not its own (heads left out by `args`) stay out.

        Raises:
            CheckpointError: a missing or misshapen tensor, by name.
        """
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with _building(self):
                model = self._built()
                missing = model.load_state_dict(_as_taken(self.architecture, tensors), strict=False).missing_keys
        finally:
            torch.set_default_dtype(default)
        if missing:
            raise CheckpointError(f"{self.folder}: the weights lack what {self.architecture} needs: {listed(missing)}")
        return model

    def load_plain(self, folder: Path) -> torch.nn.Module:
        """The model as any user loads it: `get_model(…)` and `load_state_dict` (see `snippet`)."""
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        return self.load(tensors, torch.float32)

    def warnings(self, model: torch.nn.Module) -> list[str]:
        """What is odd about the model: GoogLeNet's released auxiliary heads are not trained, says torchvision."""
        if self.architecture == "googlenet" and self.released and getattr(model, "aux_logits", False):
            return [
                "GoogLeNet's auxiliary heads train along at weight 0.3; torchvision says of its released file that they are "
                "not trained. `args: {aux_logits: false}` in config.json leaves them out, unchanged"
            ]
        return []

    def snippet(self) -> str:
        """Python that loads an output of this source, for its model card."""
        named = {**({} if self.num_classes == 1000 else {"num_classes": self.num_classes}), **self.args}
        call = ", ".join([repr(self.architecture).replace("'", '"'), *(f"{name}={value!r}" for name, value in named.items())])
        lines = ["import torchvision", "from safetensors.torch import load_file", "", 'state = load_file("model.safetensors")']
        if self.architecture.startswith("densenet"):
            lines.insert(0, "import re")
            lines.append(
                f'state = {{re.sub(r"{OLD_DENSENET.pattern}", r"\\1\\2.", key): value for key, value in state.items()}}'
            )
        if self.architecture.startswith("mnasnet"):
            lines.insert(0, "from collections import OrderedDict\n")
            lines += ["state = OrderedDict(state)", f'state._metadata = {{"": {{"version": {MNASNET_VERSION}}}}}']
        partly = ", strict=False" if self.args.get("aux_logits") is False else ""  # the file has the heads, the model has not
        lines += [f"model = torchvision.models.get_model({call})", f"model.load_state_dict(state{partly})"]
        return "\n".join(lines)

    def _built(self) -> torch.nn.Module:
        model: torch.nn.Module = models.get_model(self.architecture, num_classes=self.num_classes, **self.args)
        return model


def _as_taken(architecture: str, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors as the model's `load_state_dict` takes them: old DenseNet names are today's, MNASNet gets its version."""
    if architecture.startswith("densenet"):
        return {OLD_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in tensors.items()}
    if architecture.startswith("mnasnet"):
        state = OrderedDict(tensors)
        state._metadata = {"": {"version": MNASNET_VERSION}}  # type: ignore[attr-defined]
        return state
    return tensors


def _names(path: Path, config: dict[str, Any], own: bool) -> tuple[str, ...] | None:
    """The label names; an entry's own count only where the model still has as many classes as it."""
    found = config.get("label_names")
    if found is None or (not own and len(found) != config["num_classes"]):
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: label_names is not a list of texts")
    return tuple(found)


def _args(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("args", {})
    if not isinstance(found, dict) or {"weights", "num_classes"} & set(found):
        raise CheckpointError(
            f"{path}: args is not a mapping for get_model, or names weights or num_classes, which go by themselves"
        )
    return found


def _preprocessing(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("preprocessing")
    if not isinstance(found, dict) or set(found) != set(PREPROCESSING):
        raise CheckpointError(
            f"{path}: needs `weights`, the torchvision entry whose preprocessing holds, or `preprocessing` with "
            f"{', '.join(PREPROCESSING)}"
        )
    return found


@contextmanager
def _building(library: TorchvisionLibrary) -> Iterator[None]:
    try:
        with warnings.catch_warnings(), Undrawn():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torchvision raises whatever strange arguments make it raise
        text = "\n".join(str(error).splitlines()[:6])[:800]
        raise CheckpointError(f"{library.folder}: torchvision cannot load this as {library.architecture}: {text}") from None
