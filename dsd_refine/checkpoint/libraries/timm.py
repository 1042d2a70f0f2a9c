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
from timm.models import clean_state_dict
from timm.models._hub import load_model_config_from_path
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from dsd_refine.checkpoint.libraries.skip_init import Undrawn
from dsd_refine.errors import CheckpointError

# arguments of `timm.create_model` itself: what else to load, from where, and how
OURS = set(inspect.signature(timm.create_model).parameters) | {
    "pretrained_strict",
    "pretrained_filter_fn",
    "pretrained_custom_load",
}


@dataclass(frozen=True)
class TimmLibrary:
    """A timm checkpoint folder: `cfg` is its pretrained_cfg, `args` the arguments it was built with."""

    folder: Path
    architecture: str
    cfg: dict[str, Any]
    args: dict[str, Any]
    name: str = "timm"

    @classmethod
    def open(cls, folder: Path) -> TimmLibrary:
        """Read config.json.

        Raises:
            CheckpointError: a config that timm does not understand, or an architecture that it does not have.
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
        return cls(folder, architecture, cfg, dict(args))

    @property
    def names(self) -> list[str]:
        """What a recipe's `models` globs are matched with."""
        return [self.architecture]

    @property
    def task(self) -> str:
        return "image-classification"

    def build_meta(self) -> torch.nn.Module:
        """The model without memory: shapes only."""
        with _building(self), torch.device("meta"):
            model: torch.nn.Module = timm.create_model(
                self.architecture, pretrained=False, pretrained_cfg=self._source_free(), **self.args
            )
        return model

    def load(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
        """The model through timm's own loading (checkpoint filter included), from given tensors. Tensors too many pass.

        Raises:
            CheckpointError: missing or misshapen tensors, in timm's words.
        """
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

    def load_plain(self, folder: Path) -> torch.nn.Module:
        """The model as any user loads it: `timm.create_model("local-dir:…", pretrained=True)`."""
        with _building(self):
            model = _created(f"local-dir:{folder}")
        return model.to(torch.float32)

    def _source_free(self) -> dict[str, Any]:
        return {key: value for key, value in self.cfg.items() if key not in ("source", "file", "url", "hf_hub_id")}

    def warnings(self, model: torch.nn.Module) -> list[str]:
        return []


def _created(name: str, **options: Any) -> torch.nn.Module:
    """timm's model with weights, strictly. Where the file only has more tensors than the model, these are left out."""
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
    """Within, what is built has no unexpected tensors when it is loaded; everything else stays as strict as it is.

    `pretrained_strict=False` would let tensors be missing too, and some builders (mobilenetv3) set it themselves.
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


@contextmanager
def _building(library: TimmLibrary) -> Iterator[None]:
    try:
        with Undrawn():
            yield
    except Exception as error:  # timm raises whatever a strange config or file makes it raise
        text = "\n".join(str(error).splitlines()[:6])[:800]
        raise CheckpointError(f"{library.folder}: timm cannot load this as {library.architecture}: {text}") from None
