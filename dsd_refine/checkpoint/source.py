"""What MODEL names, and the folder its files are in: a local directory, or a snapshot of a Hub repository."""

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

from dsd_refine.checkpoint.copies import READ_PICKLES, adapter_of, is_as_large, is_weights, other_formats, shown_folder
from dsd_refine.checkpoint.guard import refuse_counts
from dsd_refine.checkpoint.layout import INDEX, PICKLE_INDEX, SINGLE, needs_leave, no_weights
from dsd_refine.checkpoint.safetensors_file import is_pointer, read_json
from dsd_refine.errors import CheckpointError, UsageError
from dsd_refine.files import leads_out
from dsd_refine.hub import ask_hub, check_blobs

# What may hold weights, by its ending: not fetched where nobody asks for weights.
HEAVY = (
    "*.bin", "*.pth", "*.pt", "*.pth.tar", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.ggml",
    "*.npz", "*.tflite", "*.mlmodel", "*.mlpackage", "*.pb", "*.pkl", "*.pickle", "*.safetensors", "*.bin.index.json",
    "*.safetensors.index.json",
)  # fmt: skip

PICKLE = "pytorch_model.bin"
CONNECT = 10.0  # seconds that the Hub has to answer
NOT_FETCHED = "not fetched"  # the revision of a source that is known from timm's registry alone
READ_BY_LIBRARIES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab")
OURS = ("dsd", "rejected", ".git", ".cache", ".eval_results")


def _is_here() -> None:
    """Nothing is left to fetch."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `resolved` is the repository or directory meant, `revision` its commit (None: a directory).

    Of what is not local only the config and its kin are here at first: `fetch` brings the rest, weights included. Opening
    the checkpoint calls it; until then the data can be held against the config, and a mistake costs no download.
    """

    model: str
    resolved: str
    revision: str | None
    folder: Path
    library: str
    fetch: Callable[[], None] = field(default=_is_here, compare=False, repr=False)

    def side_files(self, weight_files: set[str]) -> tuple[list[str], list[str], list[str]]:
        """Relative names of the files that an output copies; of copies of the weights (by name or size), a trainer's state and
        what is ours to write, which it does not; and of links that lead out of the folder, to folders or to nothing, which
        it does not either.

        The config is copied though it be such a link: it has been read, and is a model's.
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
    """Bytes of a file; 0 where it is not here."""
    return path.stat().st_size if path.is_file() else 0


def _within(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and every link to a folder (which is not followed).

    Raises:
        CheckpointError: a folder cannot be read of which an output would have the files.
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
    """Resolve MODEL and bring its config and other small files here. With `weights`, `Source.fetch` brings the rest.

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
        raise CheckpointError(f"{model}: no such directory (looked for {Path(model).absolute()})")
    if "/" in model:
        return _from_hub(model, model, weights, allow_pickle)
    return _from_timm_name(model, model, weights, allow_pickle)


def _from_folder(model: str, folder: Path, resolved: str, revision: str | None, names: Iterable[str] = ()) -> Source:
    """The source that a folder is. `names` are the files of a repository, of which the folder has what was fetched."""
    known = {*names, *(path.relative_to(folder).as_posix() for path in _within(folder))}
    config_file = folder / "config.json"
    adapter = adapter_of(folder, known)
    if not config_file.is_file():
        raise CheckpointError(f"{resolved}: has no config.json, so {_what_instead(config_file, adapter, known)}")
    if adapter:
        files = sorted(name for name in known if name == "adapter_config.json" or name.startswith("adapter_model."))
        raise CheckpointError(
            f"{resolved}: holds {adapter} beside a model: merge it first (peft's merge_and_unload), "
            f"or remove {', '.join(files)}; an output would hold the adapter's config without its weights"
        )
    _refuse_pointers(folder)
    config = read_json(config_file)
    refuse_counts(config_file, config)
    return Source(model, resolved, revision, folder, _library(config_file, config))


def _what_instead(config_file: Path, adapter: str | None, names: Iterable[str]) -> str:
    """What a folder without config.json is."""
    if config_file.is_symlink():
        return f"nothing says what it is: config.json is a link to {os.readlink(config_file)}, which is not there"
    if adapter:
        return f"it is {adapter} alone: merge it into that model first (peft's merge_and_unload), and give the merged model"
    found = other_formats(names)
    return "neither timm's nor transformers' layout" + (f"; {found}" if found else "")


def _library(config_file: Path, config: dict[str, Any]) -> str:
    """The library that a config is for. transformers' wrapper of timm's models names both: it is transformers'."""
    if config.get("library") == "torchvision":
        return "torchvision"
    if "model_type" not in config and ("architecture" in config or "pretrained_cfg" in config):
        return "timm"
    if "model_type" in config or "architectures" in config:
        return "transformers"
    raise CheckpointError(
        f"{config_file}: names neither a timm `architecture` nor a transformers `model_type`, nor `library: torchvision`; "
        "which library is it for?"
    )


def _refuse_pointers(folder: Path) -> None:
    """Refuse a clone without its large files: the libraries would read the pointers as configs and vocabularies.

    Raises:
        CheckpointError: names them.
    """
    texts = (path for path in sorted(folder.iterdir()) if path.suffix in READ_BY_LIBRARIES)
    lost = [path.name for path in texts if path.is_file() and is_pointer(path)]
    if lost:
        raise CheckpointError(
            f"{folder}: {', '.join(lost)}: git-lfs pointers, not the files; run `git lfs pull` there, or download them anew"
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
    from dsd_refine.checkpoint.torchvision_release import describe_in, entry, link_weights

    architecture, found = entry(name)
    if weights and not allow_pickle:
        raise CheckpointError(
            f"{model}: torchvision releases pickles ({found.url.rsplit('/', 1)[-1]}); pickles can carry code, so they are read "
            "only with --allow-pickle, and weights-only even then"
        )
    place = tempfile.TemporaryDirectory(prefix="dsd-refine-")
    atexit.register(place.cleanup)
    revision = describe_in(Path(place.name), architecture, found)
    fetch = partial(link_weights, Path(place.name), found) if weights else _is_here
    return Source(model, f"{architecture}.{found.name}", revision, Path(place.name), "torchvision", fetch)


def _from_hub(model: str, repo_at: str, weights: bool, allow_pickle: bool) -> Source:
    """A snapshot of a repository: what the Hub has now, or without the Hub what the cache holds."""
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = repo_at.partition("@")
    files: set[str] = set()
    fetch = _is_here
    try:
        info = ask_hub(repo, lambda: HfApi().model_info(repo, revision=revision or None, timeout=CONNECT))
    except CheckpointError as error:
        if error.__cause__ is None:  # an answer, not a missing connection: the cache must not hide it
            raise
        folder = _from_cache(repo, revision or None, weights)
    else:
        files = {each.rfilename for each in info.siblings or []}
        if weights and "config.json" in files:
            _refuse_unreadable(repo, files, allow_pickle)
        small, whole = (_not_wanted(files, heavy, allow_pickle) for heavy in (False, True))
        folder = ask_hub(repo, lambda: snapshot_download(repo, revision=info.sha, ignore_patterns=small))
        _remember(Path(folder), revision or "main", str(info.sha))

        def rest() -> None:
            ask_hub(repo, lambda: snapshot_download(repo, revision=info.sha, ignore_patterns=whole))
            check_blobs(repo, Path(folder).iterdir())

        fetch = rest if weights else _is_here
    check_blobs(repo, Path(folder).iterdir())
    return replace(_from_folder(model, Path(folder), repo, Path(folder).name, files), fetch=fetch)


def _from_cache(repo: str, revision: str | None, weights: bool) -> str:
    """A snapshot that the cache holds whole: its side files, and its model.safetensors or index if it is to have one.

    Which files hold weights is known by their names alone here; `read_layout` tells which of them are missing.
    """
    from huggingface_hub import snapshot_download

    def cached(only: list[str] | None, without: list[str] | None) -> str:
        return snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=only, ignore_patterns=without)

    if weights:
        ask_hub(repo, lambda: cached([SINGLE, INDEX], None))
    return ask_hub(repo, lambda: cached(None, list(HEAVY)))


def _refuse_unreadable(repo: str, files: set[str], allow_pickle: bool) -> None:
    """Refuse a repository without weights that could be read, before it is fetched.

    Raises:
        CheckpointError: what it holds instead, and the remedy.
    """
    at_root = sorted(name for name in files if "/" not in name)
    if any(name.endswith(".safetensors") and not name.startswith("adapter") for name in at_root):
        return
    pickles = [name for name in at_root if name in (PICKLE, PICKLE_INDEX) or name.endswith(READ_PICKLES)]
    if not pickles and "adapter_config.json" not in files:
        raise CheckpointError(no_weights(repo, files))
    if pickles and not allow_pickle:
        raise CheckpointError(needs_leave(repo, pickles[0]))


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Let the cache know which commit a branch or tag meant, as the library does when it is asked for it by name."""
    if revision == commit:
        return
    file = folder.parent.parent / "refs" / revision
    with suppress(OSError):  # a cache that is only to be read serves all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit, encoding="utf-8")


def _not_wanted(files: set[str], weights: bool, allow_pickle: bool) -> list[str]:
    """What not to fetch of a repository: what an output leaves out by its name, but what will be read.

    Copies that only their size tells are fetched: what the weights come to is not known before they are here.
    """
    if not weights:
        return list(HEAVY)
    wanted = _read_from(files, allow_pickle)
    return [_literal(name) for name in sorted(files) if is_weights(name) and name not in wanted]


def _read_from(files: set[str], allow_pickle: bool) -> set[str]:
    """The files of a repository that `read_layout` will read, and what else it wants to see: shards by their usual names."""
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
    """The fnmatch pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)
