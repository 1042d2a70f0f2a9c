"""The repository on the Hub that an output is pushed to: what it holds now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsd_refine.checkpoint.copies import may_be_weights
from dsd_refine.errors import CheckpointError, RunError
from dsd_refine.files import sha256_file
from dsd_refine.hub import ask_hub


@dataclass(frozen=True)
class Target:
    """A repository as it was when it was looked at.

    Attributes:
        repo: Its name, `org/name`.
        commit: Its newest commit. None: the repository does not exist.
        files: The names of its files.
        weights: The SHA-256 of each file that may hold weights, by name.
    """

    repo: str
    commit: str | None = None
    files: frozenset[str] = frozenset()
    weights: Mapping[str, str] = field(default_factory=dict)


def look_at(repo: str, revision: str | None = None) -> Target:
    """Return what a repository holds.

    Args:
        repo: `org/name`.
        revision: A branch or `refs/pr/N`. None: the main branch.

    Raises:
        CheckpointError: The Hub refuses, or the name is not valid.
        RunError: The Hub cannot be reached.
    """
    try:
        return _look_at(repo, revision)
    except CheckpointError as error:
        if error.__cause__ is None:
            raise
        from huggingface_hub import is_offline_mode

        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
        raise RunError(f"{repo}: {reason}, so nothing was pushed; run the same command again when it can be reached") from None


def _look_at(repo: str, revision: str | None) -> Target:
    from huggingface_hub import HfApi

    api = HfApi()
    if not ask_hub(repo, lambda: api.repo_exists(repo), "repository"):
        return Target(repo)
    info = ask_hub(repo, lambda: api.model_info(repo, revision=revision, files_metadata=True), "repository")
    siblings = info.siblings or []
    weights = {file.rfilename: _sha256(repo, file, info.sha) for file in siblings if may_be_weights(file.rfilename)}
    return Target(repo, info.sha, frozenset(file.rfilename for file in siblings), weights)


def _sha256(repo: str, file: Any, commit: str | None) -> str:
    """The SHA-256 of a file. The Hub knows it for large files only; a small file is downloaded."""
    if file.lfs is not None:
        return str(file.lfs.sha256)
    from pathlib import Path

    from huggingface_hub import hf_hub_download

    path = ask_hub(repo, lambda: hf_hub_download(repo, file.rfilename, revision=commit), "repository")
    return sha256_file(Path(path))
