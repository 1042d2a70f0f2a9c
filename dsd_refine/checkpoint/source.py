"""Resolve MODEL to a folder with its files: a local directory, or a snapshot of a Hub repository."""

from __future__ import annotations

import atexit
import difflib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from dsd_refine.checkpoint.copies import MERGE, READ_PICKLES, adapter_of, is_as_large, is_weights, other_formats, shown_folder
from dsd_refine.checkpoint.guard import refuse_counts
from dsd_refine.checkpoint.layout import INDEX, PICKLE_INDEX, SINGLE, needs_allow_pickle, no_weights
from dsd_refine.checkpoint.safetensors_file import is_pointer, read_json
from dsd_refine.checkpoint.sentence_layout import MODULES
from dsd_refine.errors import CheckpointError, UsageError
from dsd_refine.extras import is_installed, require
from dsd_refine.files import leads_out
from dsd_refine.hub import ask_hub, check_blobs
from dsd_refine.task_specs import TASKS

# Files that may hold weights. They are not fetched if only the config is needed.
HEAVY = (
    "*.bin", "*.pth", "*.pt", "*.pth.tar", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.ggml",
    "*.npz", "*.tflite", "*.mlmodel", "*.mlpackage", "*.pb", "*.pkl", "*.pickle", "*.safetensors", "*.bin.index.json",
    "*.safetensors.index.json",
)  # fmt: skip

PICKLE = "pytorch_model.bin"
CONNECT = 10.0  # seconds to wait for the Hub's answer
NOT_FETCHED = "not fetched"  # the revision of a source of which only timm's registry is known
READ_BY_LIBRARIES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
OURS = ("dsd", "rejected", ".git", ".cache", ".eval_results")  # never copied from a source


def _fetch_nothing() -> None:
    """The `fetch` of a source whose files are all here."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    At first only the config and other small files of a remote source are here. So the data can be
    checked against the config before anything large is downloaded.

    Attributes:
        model: MODEL as the user wrote it.
        resolved: The repository or directory that it means.
        revision: The commit of the repository. None: a directory.
        folder: The folder with the files.
        library: timm, torchvision or transformers.
        fetch: Downloads the other files, weights included. Opening the checkpoint calls it.
    """

    model: str
    resolved: str
    revision: str | None
    folder: Path
    library: str
    fetch: Callable[[], None] = field(default=_fetch_nothing, compare=False, repr=False)

    def side_files(self, weight_files: set[str]) -> tuple[list[str], list[str], list[str]]:
        """Sort the source's files, besides `weight_files` and README.md, by whether an output
        copies them.

        Returns:
            Three lists of names relative to the folder. First the files to copy. Then copies of the
            weights (by name or size), training states, and files that we write ourselves. Last the
            links to folders, to missing files, or to files outside the folder. A config that is a
            link to a file outside is copied, because it has been read and checked.
        """
        copied: list[str] = []
        left: dict[str, None] = {}
        links: list[str] = []
        weights = sum(_size(self.folder / name) for name in weight_files)
        for path in sorted(_within(self.folder)):
            name = path.relative_to(self.folder).as_posix()
            top = name.split("/")[0]
            if name in weight_files or name == "README.md":
                continue
            if top in OURS or is_weights(name):
                left[f"{top}/" if top in OURS and top != name else shown_folder(name) or name] = None
            elif path.is_dir() or (name != "config.json" and leads_out(path, self.folder)):
                links.append(name)
            elif path.is_file():
                if is_as_large(name, _size(path), weights):
                    left[name] = None
                else:
                    copied.append(name)
            elif path.is_symlink():
                links.append(name)
        return copied, [*left], links


def _size(path: Path) -> int:
    """The size of a file in bytes; 0 if it is not here."""
    return path.stat().st_size if path.is_file() else 0


def _within(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, and every link to a folder. Such links are not followed.

    Raises:
        CheckpointError: A folder cannot be read, and an output would have its files.
    """

    def refuse(error: OSError) -> None:
        place = Path(error.filename).relative_to(folder).as_posix()
        if place.split("/")[0] not in OURS and not is_weights(f"{place}/x"):
            why = f"cannot be read: {error.strerror or error}; an output would lack what is in it"
            raise CheckpointError(f"{error.filename}: {why}; make it readable, or move it out of the source's folder") from None

    for place, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in files)
        yield from (path for path in (Path(place, name) for name in folders) if path.is_symlink())


def find_source(model: str, *, weights: bool = True, allow_pickle: bool = False) -> Source:
    """Resolve MODEL, and download its config and other small files.

    Args:
        model: MODEL as the user wrote it.
        weights: Let `Source.fetch` download the other files. Without it, the weights are not
            needed.
        allow_pickle: Pickle files may be read.

    Raises:
        CheckpointError: The model does not exist, is gated, or has a layout that no library reads.
            Or the Hub cannot be reached and the model is not in the cache.
        UsageError: The name is both a directory and a timm model.
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
        raise CheckpointError(f"{model}: no such directory (looked for {Path(model).absolute()})")
    if "/" in model:
        return _from_hub(model, model, weights, allow_pickle)
    return _from_timm_name(model, model, weights, allow_pickle)


def _from_folder(model: str, folder: Path, resolved: str, revision: str | None, names: Iterable[str] = ()) -> Source:
    """Make a source from a folder.

    `names` are all files of its repository, of which some may not be here yet.
    """
    known = {*names, *(path.relative_to(folder).as_posix() for path in _within(folder))}
    config_file = folder / "config.json"
    adapter = adapter_of(folder, known)
    if not config_file.is_file():
        raise CheckpointError(f"{resolved}: has no config.json, so {_what_instead(config_file, adapter, known)}")
    if adapter:
        files = sorted(name for name in known if name == "adapter_config.json" or name.startswith("adapter_model."))
        raise CheckpointError(
            f"{resolved}: holds {adapter} beside a model: merge it first (peft: {MERGE}), "
            f"or remove {', '.join(files)}; an output would hold the adapter's config without its weights"
        )
    _refuse_pointers(folder)
    config = read_json(config_file)
    refuse_counts(config_file, config)
    return Source(model, resolved, revision, folder, _library(config_file, config))


def _what_instead(config_file: Path, adapter: str | None, names: Iterable[str]) -> str:
    """Describe a folder that has no config.json."""
    if config_file.is_symlink():
        return f"nothing says what it is: config.json is a link to {os.readlink(config_file)}, which is not there"
    if adapter:
        return (
            f"it is {adapter} alone, and only whole weights are refined: merge it first, and give the merged folder, with the "
            f"tokenizer saved into it too. peft: {MERGE}"
        )
    if "model_index.json" in names:
        return (
            "it is a pipeline of diffusers (model_index.json), such as text-to-image, which is not supported; supported are "
            f"{', '.join(TASKS)}"
        )
    if MODULES in names:
        return (
            "its encoder is not at the top of the folder, as sentence-transformers once wrote it: "
            "load and save it with version 3 or later (SentenceTransformer(…).save_pretrained), and give that folder"
        )
    formats = other_formats(names)
    return "neither timm's nor transformers' layout" + (f"; {formats}" if formats else "")


def _library(config_file: Path, config: dict[str, Any]) -> str:
    """The library that a config is for.

    A config of transformers' wrapper for timm models has the keys of both.
    """
    if config.get("library") == "torchvision":
        return "torchvision"
    if "model_type" not in config and ("architecture" in config or "pretrained_cfg" in config):
        return "timm"
    if "model_type" in config or "architectures" in config:
        return "transformers"
    if "_diffusers_version" in config:
        raise CheckpointError(
            f"{config_file}: is of a part of a diffusers pipeline ({config.get('_class_name')!s:.40}), which is not supported; "
            f"supported are {', '.join(TASKS)}"
        )
    raise CheckpointError(
        f"{config_file}: names neither a timm `architecture` nor a transformers `model_type`, nor `library: torchvision`; "
        "which library is it for?"
    )


def _refuse_pointers(folder: Path) -> None:
    """Refuse a clone without its large files.

    The libraries would read the pointers as configs and vocabularies.
    """
    texts = (path for path in sorted(folder.iterdir()) if path.suffix in READ_BY_LIBRARIES)
    lost = [path.name for path in texts if path.is_file() and is_pointer(path)]
    if lost:
        raise CheckpointError(
            f"{folder}: {', '.join(lost)}: git-lfs pointers, not the files; run `git lfs pull` there, or download them anew"
        )


def _is_timm_name(name: str) -> bool:
    if not is_installed("timm"):
        return False
    import timm

    return bool(timm.is_model(name.split(".")[0]))


def _from_timm_name(model: str, name: str, weights: bool, allow_pickle: bool) -> Source:
    require(f"{model}: not a directory, not a Hub repository (org/name); a model of timm", "timm", "timm", "torchvision")
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
    """Make a source from timm's registry alone. It is enough for `plan` without a network."""
    place = tempfile.TemporaryDirectory(prefix="dsd-refine-")
    atexit.register(place.cleanup)
    config = {"architecture": cfg.architecture, "num_classes": cfg.num_classes, "pretrained_cfg": cfg.to_dict()}
    Path(place.name, "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    return Source(model, str(cfg.hf_hub_id), NOT_FETCHED, Path(place.name), "timm")


def _from_torchvision(model: str, name: str, weights: bool, allow_pickle: bool) -> Source:
    """Make a folder for released weights of torchvision: a config from their entry, and a link to
    their file.
    """
    require(f"{model}: a model of torchvision", "torchvision", "torchvision", "timm")
    from dsd_refine.checkpoint.torchvision_release import describe_in, entry, link_weights

    architecture, released = entry(name)
    if weights and not allow_pickle:
        raise CheckpointError(
            f"{model}: torchvision releases pickles ({released.url.rsplit('/', 1)[-1]}); pickles can carry code, so they are "
            "read only with --allow-pickle, and weights-only even then"
        )
    place = tempfile.TemporaryDirectory(prefix="dsd-refine-")
    atexit.register(place.cleanup)
    revision = describe_in(Path(place.name), architecture, released)
    fetch = partial(link_weights, Path(place.name), released) if weights else _fetch_nothing
    return Source(model, f"{architecture}.{released.name}", revision, Path(place.name), "torchvision", fetch)


def _from_hub(model: str, name: str, weights: bool, allow_pickle: bool) -> Source:
    """Make a source from a snapshot of `org/name[@revision]`.

    Without the Hub, the cache's snapshot is used.
    """
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = name.partition("@")
    files: set[str] = set()
    fetch = _fetch_nothing
    try:
        info = ask_hub(repo, lambda: HfApi().model_info(repo, revision=revision or None, timeout=CONNECT))
    except CheckpointError as error:
        if error.__cause__ is None:  # the Hub has answered, and the cache must not hide its answer
            raise
        folder = _from_cache(repo, revision or None, weights)
    else:
        files = {file.rfilename for file in info.siblings or []}
        if weights and "config.json" in files:
            _refuse_unreadable(repo, files, allow_pickle)
        not_small, not_needed = (_not_wanted(files, heavy, allow_pickle) for heavy in (False, True))
        folder = ask_hub(repo, lambda: snapshot_download(repo, revision=info.sha, ignore_patterns=not_small))
        _remember(Path(folder), revision or "main", str(info.sha))

        def fetch_rest() -> None:
            ask_hub(repo, lambda: snapshot_download(repo, revision=info.sha, ignore_patterns=not_needed))
            check_blobs(repo, Path(folder).iterdir())

        fetch = fetch_rest if weights else _fetch_nothing
    check_blobs(repo, Path(folder).iterdir())
    return replace(_from_folder(model, Path(folder), repo, Path(folder).name, files), fetch=fetch)


def _from_cache(repo: str, revision: str | None, weights: bool) -> str:
    """The folder of a snapshot in the cache, with its side files and its model.safetensors or
    index.

    Only names tell here which files hold weights. `read_layout` reports those that are missing.
    """
    from huggingface_hub import snapshot_download

    def cached(only: list[str] | None, without: list[str] | None) -> str:
        return snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=only, ignore_patterns=without)

    if weights:
        ask_hub(repo, lambda: cached([SINGLE, INDEX], None))
    return ask_hub(repo, lambda: cached(None, list(HEAVY)))


def _refuse_unreadable(repo: str, files: set[str], allow_pickle: bool) -> None:
    """Refuse a repository without weights that can be read, before it is downloaded."""
    at_root = sorted(name for name in files if "/" not in name)
    if any(name.endswith(".safetensors") and not name.startswith("adapter") for name in at_root):
        return
    pickles = [name for name in at_root if name in (PICKLE, PICKLE_INDEX) or name.endswith(READ_PICKLES)]
    if not pickles and "adapter_config.json" not in files:
        raise CheckpointError(no_weights(repo, files))
    if pickles and not allow_pickle:
        raise CheckpointError(needs_allow_pickle(repo, pickles[0]))


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Write the commit of a branch or tag into the cache, as the library does if it is given the
    name.

    We give it the commit. Without this file, the name could not be resolved offline.
    """
    if revision == commit:
        return
    file = folder.parent.parent / "refs" / revision
    with suppress(OSError):  # a read-only cache can still be used
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit, encoding="utf-8")


def _not_wanted(files: set[str], weights: bool, allow_pickle: bool) -> list[str]:
    """Patterns of files not to download: all that may hold weights, or (`weights`) those that
    nobody will read.

    Copies of the weights that only their size would show are downloaded: sizes are not known
    before.
    """
    if not weights:
        return list(HEAVY)
    wanted = _read_from(files, allow_pickle)
    return [_literal(name) for name in sorted(files) if is_weights(name) and name not in wanted]


def _read_from(files: set[str], allow_pickle: bool) -> set[str]:
    """The weight files of a repository that `read_layout` will read.

    Shards must have their usual names.
    """
    at_root = {name for name in files if "/" not in name}
    if INDEX in files:
        return {name for name in at_root if fnmatchcase(name, "model-*.safetensors")}
    safe = {name for name in at_root if name.endswith(".safetensors") and not name.startswith("adapter")}
    if safe or not allow_pickle:
        return {SINGLE} if SINGLE in safe else safe
    if PICKLE_INDEX in files:
        return {PICKLE_INDEX, PICKLE, *(name for name in at_root if fnmatchcase(name, "pytorch_model-*.bin"))}
    if PICKLE in files:
        return {PICKLE}
    return {name for name in at_root if name.endswith(READ_PICKLES)}


def _literal(name: str) -> str:
    """The fnmatch pattern that matches only this name."""
    return re.sub(r"([*?[])", r"[\1]", name)
