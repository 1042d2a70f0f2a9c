"""torchvision's classification models: a folder that says how its model is built, of a released
weights entry or by hand.

config.json holds `library: torchvision`, `architecture`, `weights` (the entry whose facts hold
where the file says nothing), `num_classes`, `label_names`, `args` (for
`torchvision.models.get_model`) and `preprocessing`.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import load_file
from torchvision import models
from torchvision.models._meta import _IMAGENET_CATEGORIES
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification as Preset

from dsd_refine.checkpoint.libraries.class_names import checked_names, imagenet_names
from dsd_refine.checkpoint.libraries.skip_init import SkipInit
from dsd_refine.checkpoint.preprocessing import Preprocessing, json_values, normalising
from dsd_refine.checkpoint.safetensors_file import listed, read_json
from dsd_refine.checkpoint.torchvision_release import describe, entry
from dsd_refine.errors import CheckpointError

KEYS = ("library", "architecture", "weights", "num_classes", "label_names", "args", "preprocessing")
PREPROCESSING = ("resize_size", "crop_size", "mean", "std", "interpolation")
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")  # names in the released DenseNet files
MNASNET_VERSION = 2  # a state dict without its `_metadata` (safetensors has none) is refused by MNASNet


@dataclass(frozen=True)
class TorchvisionLibrary:
    """A torchvision checkpoint folder. `args` go to the model's builder, `transform` to
    torchvision's own preset.
    """

    folder: Path
    architecture: str
    num_classes: int
    categories: tuple[str, ...] | None
    args: dict[str, Any]
    transform: dict[str, Any]
    released: bool
    task: str = "image-classification"
    name: str = "torchvision"
    config: None = None
    trust_remote_code: bool = False

    @classmethod
    def open(cls, folder: Path, task: str | None = None) -> TorchvisionLibrary:
        """Read config.json; what it leaves out is taken from the weights entry that it names.

        Raises:
            CheckpointError: an unknown key, architecture or entry, or neither an entry nor what it
                would say.
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
        args, transform = _args(path, whole), _transform(path, whole)
        return cls(folder, architecture, classes, names, args, transform, bool(tag), task or cls.task)

    @property
    def names(self) -> list[str]:
        """Return the name of the torchvision architecture alone."""
        return [self.architecture]

    def build_meta(self, *, buffers: bool = False) -> torch.nn.Module:
        """Build the model of `config.json` on the meta device with `torchvision.models.get_model`.

        Only its parameters are there: its buffers have their values in any case.

        Raises:
            CheckpointError: torchvision cannot build it.
        """
        with _building(self), init_empty_weights():  # torch.device("meta") would break RegNet, which computes its widths
            return self._built()

    def load(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
        """As in `Library`. Tensors that are not the model's own (heads left out by `args`) are
        ignored.
        """
        self.build_meta()
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

    def load_plain(self, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """By `get_model(…)` and `load_state_dict`, as `snippet` does."""
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        return self.load(tensors, dtype)

    def label_names(self) -> tuple[list[list[str]] | None, int]:
        """As in `Library`. The names of ImageNet-1k have a second one: the WordNet id."""
        if self.categories is None:
            return None, self.num_classes
        if list(self.categories) == list(_IMAGENET_CATEGORIES):
            ids = [ids[0] for ids in imagenet_names(self.num_classes) or ()]
            return [list(names) for names in zip(self.categories, ids, strict=True)], self.num_classes
        return [[name] for name in checked_names(self.categories, self.num_classes)], self.num_classes

    def preprocessing(self, model: torch.nn.Module) -> Preprocessing:
        """torchvision's own transform of its released weights, with the sizes and statistics of
        config.json.
        """
        return preset_preprocessing(self.transform)

    def warnings(self, model: torch.nn.Module) -> list[str]:
        """GoogLeNet's released auxiliary heads are not trained, says torchvision."""
        if self.architecture == "googlenet" and self.released and getattr(model, "aux_logits", False):
            return [
                "GoogLeNet's auxiliary heads train along at weight 0.3; torchvision says of its released file that they are "
                "not trained. `args: {aux_logits: false}` in config.json leaves them out, unchanged"
            ]
        return []

    def snippet(self) -> str:
        """Return Python code that builds the model with `get_model` and loads `model.safetensors`.

        For DenseNet and MNASNet, the code also converts the state dict to what the model loads.
        """
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
    """The tensors as the model's `load_state_dict` takes them: old DenseNet names are today's,
    MNASNet gets its version.
    """
    if architecture.startswith("densenet"):
        return {OLD_DENSENET.sub(r"\1\2.", name): tensor for name, tensor in tensors.items()}
    if architecture.startswith("mnasnet"):
        state = OrderedDict(tensors)
        state._metadata = {"": {"version": MNASNET_VERSION}}  # type: ignore[attr-defined]
        return state
    return tensors


def _names(path: Path, config: dict[str, Any], own: bool) -> tuple[str, ...] | None:
    """The label names; an entry's own count only where the model still has as many classes as it."""
    names = config.get("label_names")
    if names is None or (not own and len(names) != config["num_classes"]):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: label_names is not a list of texts")
    return tuple(names)


def _args(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    args = config.get("args", {})
    if not isinstance(args, dict) or {"weights", "num_classes"} & set(args):
        raise CheckpointError(
            f"{path}: args is not a mapping for get_model, or names weights or num_classes, which go by themselves"
        )
    return args


def _transform(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    transform = config.get("preprocessing")
    if not isinstance(transform, dict) or set(transform) != set(PREPROCESSING):
        raise CheckpointError(
            f"{path}: needs `weights`, the torchvision entry whose preprocessing holds, or `preprocessing` with "
            f"{', '.join(PREPROCESSING)}"
        )
    return transform


def preset_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """torchvision's own transform of its released weights, with the sizes and statistics of a
    torchvision config.

    Raises:
        CheckpointError: an unknown interpolation, or values that are no sizes.
    """
    try:
        mode = InterpolationMode(config["interpolation"])
        transform = Preset(**{**config, "interpolation": mode})
        size = int(config["crop_size"])
        transform(Image.new("RGB", (8, 8)))
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises the last one for two means of three channels
        raise CheckpointError(f"the preprocessing of config.json is not usable: {error}") from None
    return Preprocessing(
        channels=3,
        evaluation=transform,
        training=transform,
        normalise=normalising(config["mean"], config["std"]),
        size=(size, size),
        interpolation=mode,
        shown=json_values(config),
    )


@contextmanager
def _building(library: TorchvisionLibrary) -> Iterator[None]:
    try:
        with warnings.catch_warnings(), SkipInit():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torchvision raises whatever strange arguments make it raise
        text = "\n".join(str(error).splitlines()[:6])[:800]
        raise CheckpointError(f"{library.folder}: torchvision cannot load this as {library.architecture}: {text}") from None
