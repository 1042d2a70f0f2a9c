"""timm's layout: building and loading go through timm, with tensors that we read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import init_empty_weights
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import clean_state_dict
from timm.models._hub import load_model_config_from_path
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from dsd_refine.checkpoint.libraries.class_names import checked_names, imagenet_names
from dsd_refine.checkpoint.libraries.skip_init import SkipInit
from dsd_refine.checkpoint.preprocessing import Preprocessing, interpolation_mode, json_values, normalising
from dsd_refine.errors import CheckpointError

# arguments of `timm.create_model` itself: what else to load, from where, and how
OURS = set(inspect.signature(timm.create_model).parameters) | {
    "pretrained_strict",
    "pretrained_filter_fn",
    "pretrained_custom_load",
}


@dataclass(frozen=True)
class TimmLibrary:
    """A timm checkpoint folder: `cfg` is its pretrained_cfg, `args` the arguments it was built
    with.
    """

    folder: Path
    architecture: str
    cfg: dict[str, Any]
    args: dict[str, Any]
    task: str = "image-classification"
    name: str = "timm"
    config: None = None
    trust_remote_code: bool = False

    @classmethod
    def open(cls, folder: Path, task: str | None = None) -> TimmLibrary:
        """Read config.json.

        Raises:
            CheckpointError: a config that timm does not understand, or an architecture that it does
                not have.
        """
        try:
            cfg, architecture, args = load_model_config_from_path(folder)
            cfg["num_classes"] = int(cfg.get("num_classes", 0))
        except Exception as error:  # timm raises whatever a strange config makes it raise
            raise CheckpointError(f"{folder}/config.json: timm cannot read it: {error!r:.200}") from None
        if not isinstance(architecture, str) or not timm.is_model(architecture):
            raise CheckpointError(f"{folder}/config.json: timm {timm.__version__} has no architecture {architecture!r}")
        if cfg["num_classes"] <= 0:
            raise CheckpointError(f"{folder}/config.json: a model without classifier (num_classes 0) has nothing to refine")
        ours = sorted(OURS & set(args))
        if ours:
            raise CheckpointError(
                f"{folder}/config.json: its model_args set {', '.join(ours)}, which is not theirs to set; refused"
            )
        return cls(folder, architecture, cfg, dict(args), task or cls.task)

    @property
    def names(self) -> list[str]:
        """Return the name of the timm architecture alone."""
        return [self.architecture]

    def build_meta(self, *, buffers: bool = False) -> torch.nn.Module:
        """Build the model of `config.json` on the meta device with `timm.create_model`.

        With `buffers`, only the parameters are on the meta device.

        Raises:
            CheckpointError: timm cannot build it.
        """
        with _building(self), init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model: torch.nn.Module = timm.create_model(
                self.architecture, pretrained=False, pretrained_cfg=self._source_free(), **self.args
            )
        return model

    def load(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
        """As in `Library`; timm's checkpoint filter is applied, and errors are in timm's words."""
        self.build_meta()
        cfg = {**self._source_free(), "state_dict": clean_state_dict(dict(tensors))}  # as it does for a file of its own
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with _building(self):
                model = _created(self.architecture, pretrained_cfg=cfg, **self.args)
        finally:
            torch.set_default_dtype(default)
        del model.pretrained_cfg["state_dict"]  # type: ignore[union-attr, operator]
        return model

    def load_plain(self, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """By `timm.create_model("local-dir:…", pretrained=True)`."""
        with _building(self):
            model = _created(f"local-dir:{folder}")
        return model.to(dtype)

    def _source_free(self) -> dict[str, Any]:
        return {key: value for key, value in self.cfg.items() if key not in ("source", "file", "url", "hf_hub_id")}

    def label_names(self) -> tuple[list[list[str]] | None, int]:
        """As in `Library`: those of `label_names`, else ImageNet's where the head has its size."""
        classes = int(self.args.get("num_classes", self.cfg["num_classes"]))
        own = self.cfg.get("label_names")
        if not own:
            return imagenet_names(classes), classes
        described = self.cfg.get("label_descriptions")
        texts = described if isinstance(described, dict) else {}
        return [[name, *([str(texts[name])] if name in texts else [])] for name in checked_names(own, classes)], classes

    def preprocessing(self, model: torch.nn.Module) -> Preprocessing:
        """What `pretrained_cfg` says: the test size for evaluation, the input size for training."""
        return timm_preprocessing(model)

    def snippet(self) -> str:
        """Return Python code that loads the folder with `timm.create_model("local-dir:…")`."""
        where = '"local-dir:path/to/this/folder"'
        return f'import timm\n\nmodel = timm.create_model({where}, pretrained=True)  # or "hf-hub:owner/name"'

    def warnings(self, model: torch.nn.Module) -> list[str]:
        """Return no warnings: there are none about timm models."""
        return []


def _created(name: str, **options: Any) -> torch.nn.Module:
    """timm's model with weights, strictly. Where the file only has more tensors than the model,
    these are left out.
    """
    try:
        return _pretrained(name, **options)
    except RuntimeError as error:
        said = str(error)
        if "Unexpected key(s)" not in said or "Missing key(s)" in said or "size mismatch" in said:
            raise
    with _leaving_out():
        return _pretrained(name, **options)


def _pretrained(name: str, **options: Any) -> torch.nn.Module:
    model: torch.nn.Module = timm.create_model(name, pretrained=True, **options)
    return model


@contextmanager
def _leaving_out() -> Iterator[None]:
    """Within, what is built has no unexpected tensors when it is loaded; everything else stays as
    strict as it is.

    `pretrained_strict=False` would let tensors be missing too, and some builders (mobilenetv3) set
    it themselves.
    """
    handles: dict[torch.nn.Module, RemovableHandle] = {}

    def forgive(_: torch.nn.Module, keys: Any) -> None:
        keys.unexpected_keys.clear()

    def told(parent: torch.nn.Module, *_: Any) -> None:
        if parent not in handles:  # the root is none's child, so that it is met as a parent only
            handles[parent] = parent.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]

    building = register_module_module_registration_hook(told)
    try:
        yield
    finally:
        for handle in (building, *handles.values()):
            handle.remove()


def timm_preprocessing(model: torch.nn.Module) -> Preprocessing:
    """What a timm model's `pretrained_cfg` says: the test size for evaluation, the input size for
    training.

    Raises:
        CheckpointError: nothing that can be done to an image.
    """
    _refuse_other_channels(model)
    try:
        preprocessing = _resolved(model)
        for transform in (preprocessing.evaluation, preprocessing.training):
            transform(Image.new("RGB" if preprocessing.channels == 3 else "L", (40, 64)))
    except Exception as error:  # timm and torchvision raise whatever a strange config makes them raise
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the preprocessing of config.json (pretrained_cfg) is not usable: {text}") from None
    return preprocessing


def _refuse_other_channels(model: torch.nn.Module) -> None:
    """A mean (or deviation) for each channel, or one for all, as timm's own transform takes them."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    for size in ("input_size", "test_input_size"):
        channels = (cfg.get(size) or (3,))[0]
        for name in ("mean", "std"):
            values = cfg.get(name)
            if isinstance(values, list | tuple) and len(values) not in (1, channels):
                raise CheckpointError(
                    f"config.json: pretrained_cfg has {len(values)} values of `{name}`, and `{size}` says {channels} channels "
                    f"(in_chans): give `{name}` one value for each channel, as it was trained with"
                )


def _resolved(model: torch.nn.Module) -> Preprocessing:
    test = resolve_data_config({}, model=model, use_test_size=True)
    train = resolve_data_config({}, model=model, use_test_size=False)
    return Preprocessing(
        channels=test["input_size"][0],
        evaluation=create_transform(**test, is_training=False),
        training=create_transform(**train, is_training=False),
        normalise=normalising(test["mean"], test["std"]),
        size=tuple(train["input_size"][1:]),
        interpolation=interpolation_mode(train["interpolation"]),
        shown={"evaluation": json_values(test), "training": json_values(train)},
    )


@contextmanager
def _building(library: TimmLibrary) -> Iterator[None]:
    try:
        with SkipInit():
            yield
    except Exception as error:  # timm raises whatever a strange config or file makes it raise
        text = "\n".join(str(error).splitlines()[:6])[:800]
        raise CheckpointError(f"{library.folder}: timm cannot load this as {library.architecture}: {text}") from None
