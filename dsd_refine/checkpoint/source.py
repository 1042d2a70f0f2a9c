"""What MODEL names, and the folder its files are in: a local directory, or a snapshot of a Hub repository."""

from __future__ import annotations

import atexit
import difflib
import fnmatch
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsd_refine.checkpoint.guard import refuse_counts
from dsd_refine.checkpoint.hub import ask_hub, check_blobs
from dsd_refine.checkpoint.layout import INDEX, SINGLE, read_json
from dsd_refine.errors import CheckpointError, UsageError

# Files of other frameworks that hold the same weights once more. They are neither fetched nor copied: they would be stale.
OTHER_WEIGHTS = (
    "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.ggml", "*.npz",
    "*.tflite", "*.mlmodel", "*.mlpackage", "*.pb", "*.pkl", "*.pickle", "*.safetensors", "*.bin.index.json",
    "*.safetensors.index.json",
)  # fmt: skip
CONNECT = 10.0  # seconds that the Hub has to answer
NOT_FETCHED = "not fetched"  # the revision of a source that is known from timm's registry alone
OURS = ("dsd", "rejected", ".git", ".cache", ".eval_results")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `resolved` is the repository or directory meant, `revision` its commit (None: a directory)."""

    model: str
    resolved: str
    revision: str | None
    folder: Path
    library: str

    def side_files(self, weight_files: set[str]) -> tuple[list[str], list[str]]:
        """Relative names of the files that an output copies, and of those that it does not (for the warnings)."""
        copied: list[str] = []
        left: list[str] = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_file() or name in weight_files or name == "README.md":
                continue
            dropped = name.split("/")[0] in OURS or is_weights(name)
            (left if dropped else copied).append(name)
        return copied, left


def is_weights(name: str) -> bool:
    """Does the name look like a copy of the weights in some format?"""
    return any(fnmatch.fnmatch(name.rsplit("/", 1)[-1].lower(), pattern) for pattern in OTHER_WEIGHTS)


def find_source(model: str, *, weights: bool = True, allow_pickle: bool = False) -> Source:
    """Resolve MODEL and bring its files here. `weights=False` fetches everything but the weights.

    Raises:
        CheckpointError: not there, gated, offline without a cached copy, or neither timm's nor transformers' layout.
        UsageError: a name that could mean two things, or a kind of source that this version lacks.
    """
    scheme, _, rest = model.partition(":")
    if scheme == "torchvision" and rest:
        return _from_torchvision(model, rest, weights, allow_pickle)
    if scheme == "timm" and rest:
        return _from_timm_name(model, rest, weights, allow_pickle)
    if scheme in ("hf-hub", "hf_hub") and rest:
        return _from_hub(model, rest, weights, allow_pickle)
    if Path(model).is_dir():
        if os.sep not in model and model != "." and _is_timm_name(model):
            raise UsageError(f"{model!r} is both a directory here and a timm model: say ./{model} or timm:{model}")
        return _from_folder(model, Path(model).resolve(), str(Path(model).resolve()), None)
    if Path(model).exists():
        raise CheckpointError(f"{model}: is a file; give the directory that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such directory")
    if "/" in model:
        return _from_hub(model, model, weights, allow_pickle)
    return _from_timm_name(model, model, weights, allow_pickle)


def _from_folder(model: str, folder: Path, resolved: str, revision: str | None) -> Source:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{resolved}: has no config.json, so neither timm's nor transformers' layout")
    config = read_json(config_file)
    refuse_counts(config_file, config)
    if config.get("library") == "torchvision":
        return Source(model, resolved, revision, folder, "torchvision")
    if "architecture" in config or "pretrained_cfg" in config:
        return Source(model, resolved, revision, folder, "timm")
    if "model_type" in config or "architectures" in config:
        return Source(model, resolved, revision, folder, "transformers")
    raise CheckpointError(
        f"{config_file}: names neither a timm `architecture` nor a transformers `model_type`, nor `library: torchvision`; "
        "which library is it for?"
    )


def _is_timm_name(name: str) -> bool:
    import timm

    return bool(timm.is_model(name.split(".")[0]))


def _from_timm_name(model: str, name: str, weights: bool, allow_pickle: bool) -> Source:
    import timm

    if not _is_timm_name(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CheckpointError(f"{model}: not a directory, not a Hub repository (org/name), not a timm model{hint}")
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, KeyError, ValueError):
        base = name.split(".")[0]
        known = ", ".join(timm.list_pretrained(f"{base}.*")) or "none"
        raise CheckpointError(f"{model}: timm has no such weights of {base}; it has {known}") from None
    if cfg is None or not cfg.hf_hub_id:
        raise CheckpointError(f"{model}: timm knows the architecture but no released weights of it on the Hub")
    try:
        return _from_hub(model, str(cfg.hf_hub_id), weights, allow_pickle)
    except CheckpointError as error:
        if weights or error.__cause__ is None:
            raise
        return _from_registry(model, cfg)


def _from_registry(model: str, cfg: Any) -> Source:
    """What timm itself knows of a released model: enough for `plan` where there is no network."""
    place = tempfile.TemporaryDirectory(prefix="dsd-refine-")
    atexit.register(place.cleanup)
    config = {"architecture": cfg.architecture, "num_classes": cfg.num_classes, "pretrained_cfg": cfg.to_dict()}
    Path(place.name, "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    return Source(model, str(cfg.hf_hub_id), NOT_FETCHED, Path(place.name), "timm")


def _from_torchvision(model: str, name: str, weights: bool, allow_pickle: bool) -> Source:
    """A released weights entry of torchvision, as a folder of its own: what the entry says, and a link to its file."""
    from dsd_refine.checkpoint.torchvision import entry, materialise

    architecture, found = entry(name)
    if weights and not allow_pickle:
        raise CheckpointError(
            f"{model}: torchvision releases pickles ({found.url.rsplit('/', 1)[-1]}); pickles can carry code, so they are read "
            "only with --allow-pickle, and weights-only even then"
        )
    place = tempfile.TemporaryDirectory(prefix="dsd-refine-")
    atexit.register(place.cleanup)
    revision = materialise(architecture, found, Path(place.name), fetch=weights)
    return Source(model, f"{architecture}.{found.name}", revision, Path(place.name), "torchvision")


def _from_hub(model: str, repo_at: str, weights: bool, allow_pickle: bool) -> Source:
    """A snapshot of a repository: what the Hub has now, or without the Hub what the cache holds."""
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = repo_at.partition("@")
    try:
        info = ask_hub(repo, lambda: HfApi().model_info(repo, revision=revision or None, timeout=CONNECT))
    except CheckpointError as error:
        if error.__cause__ is None:  # an answer, not a missing connection: the cache must not hide it
            raise
        ignore = _not_wanted({SINGLE}, weights, allow_pickle)
        folder = ask_hub(
            repo, lambda: snapshot_download(repo, revision=revision or None, ignore_patterns=ignore, local_files_only=True)
        )
    else:
        ignore = _not_wanted({each.rfilename for each in info.siblings or []}, weights, allow_pickle)
        folder = ask_hub(repo, lambda: snapshot_download(repo, revision=info.sha, ignore_patterns=ignore))
        _remember(Path(folder), revision or "main", str(info.sha))
    check_blobs(repo, Path(folder).iterdir())
    return _from_folder(model, Path(folder), repo, Path(folder).name)


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Let the cache know which commit a branch or tag meant, as the library does when it is asked for it by name."""
    if revision == commit:
        return
    file = folder.parent.parent / "refs" / revision
    with suppress(OSError):  # a cache that is only to be read serves all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit, encoding="utf-8")


def _not_wanted(files: set[str], weights: bool, allow_pickle: bool) -> list[str]:
    """What not to fetch of a repository: everything that holds weights and is not the copy that will be read."""
    if not weights:
        return list(OTHER_WEIGHTS)
    safe = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if safe or not allow_pickle:
        wanted = {SINGLE, INDEX, *safe}
        return [p for p in OTHER_WEIGHTS if "safetensors" not in p] + [n for n in files if is_weights(n) and n not in wanted]
    return [p for p in OTHER_WEIGHTS if p not in ("*.bin", "*.pth", "*.pt", "*.bin.index.json")]
