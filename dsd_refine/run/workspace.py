"""A run's files: all in OUT.partial/ until one rename publishes them, with the state to resume
from.

The state is safetensors and JSON, never pickle. Each save writes a new file, syncs it, and becomes
the state by one rename.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from safetensors.torch import load_file

from dsd_refine.checkpoint.safetensors_file import build_header, memory
from dsd_refine.errors import AgreedError, RunError, UsageError
from dsd_refine.files import remove, replace_parts, replace_text, sha256_file, sync, sync_file, sync_folder, umask
from dsd_refine.run import disk as space

if TYPE_CHECKING:
    from dsd_refine.training.shards import Shards

REPORT = "dsd/report.json"
LOG_EVERY = 1.0  # seconds in which lines of log.jsonl are gathered
# If this file is in OUT.partial/, out/ is complete and verified. If out/ is then missing, it was
# already renamed to OUT.
MOVING = "moving"
KEPT = ("lock", "pid", "cache", "tries")  # what a new start does not remove from OUT.partial/
# Patterns of all names that a run uses in OUT.partial/.
OURS = (
    "lock",
    "pid",
    "cache",
    "tries",
    MOVING,
    "out",
    "replaced",
    "phases",
    "log.jsonl",
    "state*",
    "best-*",
    "scores-*",
    "*.tmp",
)
SWEPT = ("state-*.safetensors", "best-*.safetensors")
PART = re.compile(r"\.part-\d+-of-\d+(?=\.safetensors$)")  # in the name of a file that one process of a sharded run wrote
CHANGED = "it has changed since it was saved"


class Workspace:
    """OUT and its sibling OUT.partial/.

    Attributes:
        state: The JSON part of the saved state, empty in a new run.
        need: The number of bytes that the run needs on the disk.
        shards: How the model is divided among processes. None: this process has all of it.

    Args:
        out: The output directory.
        writes: Whether this process writes. Of several processes, only the main one does.
        save_every: Minutes between two saves.

    Raises:
        UsageError: The path cannot be an output directory, such as `/`.
    """

    def __init__(self, out: Path, *, writes: bool = True, save_every: float = 10.0) -> None:
        self.out = out.resolve() if out.is_symlink() else Path(os.path.abspath(out))
        if not self.out.name:
            raise UsageError(f"{out}: cannot be an output directory; give one below it")
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.writes = writes
        self.save_every = 60 * save_every
        self.overwrite = False
        self.state: dict[str, Any] = {}
        self.need = 0
        self.shards: Shards | None = None
        self.last_save = time.monotonic()
        self.unsaved = 0
        self._log_hash = hashlib.sha256()
        self._lines: list[bytes] = []
        self._log_written = -math.inf

    @property
    def ready(self) -> Path:
        """The folder that the final rename publishes."""
        return self.partial / "out"

    @property
    def log_file(self) -> Path:
        """The log of the run."""
        return self.partial / "log.jsonl"

    def finished(self) -> bool:
        """Return whether OUT has the report of a finished run."""
        return is_ours(self.out)

    def check_target(self, source: Path, *, resume: bool, overwrite: bool) -> None:
        """Check that OUT can be written: it is not the source, and it is empty or may be
        overwritten.

        Raises:
            UsageError: It cannot.
        """
        out, self.overwrite = self.out.resolve(), overwrite
        self._refuse_strange()
        if out == source.resolve() or source.resolve() in out.parents or out in source.resolve().parents:
            raise UsageError(f"{self.out}: the output would lie in or over the source; give another --output-dir")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise UsageError(f"{self.out}: is not empty; give another --output-dir, or --overwrite")
            if not self.finished():
                raise UsageError(
                    f"{self.out}: has no report of dsd-refine, so --overwrite will not remove it; remove it yourself"
                )
        elif self.out.exists() and not out.is_dir():
            raise UsageError(f"{self.out}: is a file; give another --output-dir")
        if os.path.ismount(out):
            raise UsageError(f"{self.out}: is a mount point, which no rename can replace; give a directory below it")
        if self.partial.exists() and not (resume or overwrite):
            raise UsageError(f"{self.partial}: an unfinished run is there; go on with --resume, or start anew with --overwrite")

    def _refuse_strange(self) -> None:
        """Refuse an OUT.partial/ with files that no run wrote, because runs empty and remove this
        folder.
        """
        names = sorted(path.name for path in self.partial.iterdir()) if self.partial.is_dir() else []
        strange = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in OURS)]
        if strange or (self.partial.exists() and not self.partial.is_dir()):
            problem = f"has the file {strange[0]!r}, which is" if strange else "is"
            raise UsageError(f"{self.partial}: {problem} not from dsd-refine; move it, or give another --output-dir")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock OUT.partial/ for this process inside a `with` block.

        If the run cannot begin, the folder is removed, unless it has the state of an earlier run.

        Raises:
            UsageError: Another process uses the folder, or it cannot be written.
        """
        lock = filelock.FileLock(self.partial / "lock", mode=0o666 & ~umask())
        try:
            self._take(lock)
            yield
        except (UsageError, KeyboardInterrupt):
            if lock.is_locked and (self.partial / "lock").is_file():
                self.abandon()
            raise
        finally:
            with suppress(OSError):  # a full disk has been reported by then
                self.write_log()
            lock.release()

    def _take(self, lock: filelock.BaseFileLock) -> None:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            (self.partial / "pid").write_text(f"{os.getpid()}\n")
        except filelock.Timeout:
            raise UsageError(f"{self.partial}: another run{self._holder()} uses this folder") from None
        except OSError as error:
            raise UsageError(f"{self.partial}: cannot be written: {error.strerror or error}") from None
        # Another run may have ended, and removed OUT.partial/ with the lock, before or after we
        # took the lock.
        if not (self.partial / "lock").is_file() or (self.finished() and not self.overwrite):
            raise UsageError(f"{self.out}: another run has just ended there; look at its output, then try again")
        shutil.rmtree(self.partial / "cache", ignore_errors=True)  # it is never synced, so its files may be incomplete

    def _holder(self) -> str:
        try:
            return f" (process {(self.partial / 'pid').read_text().strip()})"
        except OSError:
            return ""

    def begin(self, identity: dict[str, Any], resume: bool) -> None:
        """Load the saved state if `resume` and there is one, else start anew.

        Raises:
            UsageError: The saved run had another recipe, source, data or library version
                (`identity`).
        """
        file = self.partial / "state.json"
        if resume and file.is_file():
            self.state = _read_state(file)
            _refuse_difference(self.state["identity"], identity)
        elif self.writes:
            self.clear()
        if self.writes:
            (self.partial / MOVING).unlink(missing_ok=True)
        self.state.setdefault("identity", identity)
        if self.writes:
            self._cut_log()

    def clear(self) -> None:
        """Remove the files of an earlier run from OUT.partial/."""
        (self.partial / MOVING).unlink(missing_ok=True)
        for path in self.partial.iterdir():
            if path.name not in KEPT:
                remove(path)

    def abandon(self) -> None:
        """Remove OUT.partial/ after a run that trained nothing, unless it has the state of an
        earlier run.
        """
        has_tries = any(self.partial.glob("tries/*/*.json"))
        if not (self.partial / "state.json").is_file() and not has_tries:
            self.discard()

    def _cut_log(self) -> None:
        """Cut the log back to the saved step, and check it."""
        size = self.state.get("log_bytes", 0)
        with self.log_file.open("a+b") as file:
            file.seek(0)
            self._log_hash = hashlib.sha256(file.read(size))
            if self._log_hash.hexdigest() != self.state.get("log_sha256", hashlib.sha256().hexdigest()):
                raise _unusable(self.log_file, ValueError(CHANGED))
            file.truncate(size)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to log.jsonl. Lines are gathered, and written at least once in LOG_EVERY seconds of logging."""
        if self.writes:
            self._lines.append((json.dumps(line) + "\n").encode())
            if time.monotonic() - self._log_written > LOG_EVERY:
                self.write_log()

    def write_log(self) -> None:
        """Write the gathered lines to log.jsonl."""
        data, self._log_written = b"".join(self._lines), time.monotonic()
        self._lines.clear()
        if data:
            with self.log_file.open("ab") as file:
                file.write(data)
            self._log_hash.update(data)

    def save_due(self) -> bool:
        """Return whether it is time for a save, or so many files are new that old ones must go."""
        return time.monotonic() - self.last_save > self.save_every or self.unsaved >= space.UNSAVED

    def save(self, tensors: dict[str, torch.Tensor] | None, run: dict[str, Any] | None = None) -> None:
        """Save the state.

        Args:
            tensors: The tensors of the current phase. None between phases.
            run: The JSON form of `RunState`.
        """
        self.last_save = time.monotonic()
        self.state["run"] = run or {}
        self.state["save"] = number = int(self.state.get("save", 0)) + 1
        self.state["tensors"] = None
        if tensors is not None:
            self.state["tensors"] = f"state-{number}.safetensors"
            self.write_weights(self.state["tensors"], tensors)
        if self.writes:
            self._write_state()
        self.unsaved = 0

    def _write_state(self) -> None:
        self.state["log_bytes"], self.state["log_sha256"] = self._sync_log(), self._log_hash.hexdigest()
        replace_text(self.partial / "state.json", json.dumps(self.state | {"sha256": _digest(self.state)}))
        self._sweep()

    def _sync_log(self) -> int:
        """Write the gathered lines, sync the log to the disk, and return its length in bytes."""
        self.write_log()
        with self.log_file.open("rb") as file:
            sync(file)
            return os.fstat(file.fileno()).st_size

    def _sweep(self) -> None:
        """Remove tensor files that the saved state does not name: older states, and weights that
        are no longer the best.
        """
        named = set(_texts(self.state))
        for path in [path for pattern in SWEPT for path in self.partial.glob(pattern)]:
            if PART.sub("", path.name) not in named:
                path.unlink()
                self.state.get("files", {}).pop(path.name, None)

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a safetensors file into OUT.partial/, completely or not at all.

        It is written tensor by tensor, because memory may not have room for a copy of all. Tensors
        that share memory are stored separately.
        """
        self.unsaved += 1
        if self.writes:
            self.state.setdefault("files", {})[name] = self._write_file(name, tensors)

    def _write_file(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        """Write a safetensors file, and return its SHA-256."""
        # The widest dtypes first: so each tensor starts at a multiple of its element size,
        # which mapping needs.
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        head, entries = build_header(ordered, {})
        parts: Iterator[bytes | memoryview] = chain([head], map(memory, ordered.values()))
        size = max((entry.end for entry in entries), default=len(head))
        return replace_parts(self.partial / name, parts, size)

    def write_weights(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write tensors of the model's shapes, as `write_tensors` does.

        In a sharded run each process writes a file with its rows of them, and the saved state has the
        hashes of all.

        Raises:
            RunError: A file cannot be written. If one process has no room, it is raised in all, so that none waits for it.
        """
        if self.shards is None:
            self.write_tensors(name, tensors)
            return
        self.unsaved += 1
        part, digest, problem = self._part(name), "", None
        try:
            digest = self._write_file(part, tensors)
        except RunError as error:
            problem = str(error)
        written = self.shards.exchanged((part, digest, problem))
        for _, _, each in written:
            if each is not None:
                raise AgreedError(each)
        self.state.setdefault("files", {}).update({part: digest for part, digest, _ in written})

    def read_weights(self, name: str) -> dict[str, torch.Tensor]:
        """Read what `write_weights` wrote: in a sharded run, the rows of this process.

        Raises:
            UsageError: The file is missing, or has changed.
        """
        return self.read_tensors(name if self.shards is None else self._part(name))

    def _part(self, name: str) -> str:
        """Return the name of this process's part of a file of weights."""
        assert self.shards is not None
        return name.replace(".safetensors", f".part-{self.shards.rank + 1}-of-{self.shards.world}.safetensors")

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a file that `write_tensors` wrote.

        Raises:
            UsageError: The file is missing, or has changed.
        """
        path, digest = self.partial / Path(name).name, self.state.get("files", {}).get(name)
        try:
            if digest is not None and sha256_file(path) != digest:
                raise ValueError(CHANGED)
            return load_file(path)
        except Exception as error:  # safetensors has its own errors for a broken file
            raise _unusable(path, error) from None

    def publish(self) -> None:
        """Publish OUT by one rename, then remove OUT.partial/.

        Raises:
            RunError: OUT now has files that must not be overwritten.
        """
        for path in self.ready.rglob("*"):
            sync_folder(path) if path.is_dir() else sync_file(path)
        sync_folder(self.ready)
        replace_text(self.partial / MOVING, f"{self.ready.name} -> {self.out.name}\n")
        try:
            if self.overwrite and self.finished():
                os.replace(self.out, self.partial / "replaced")
            os.replace(self.ready, self.out)
        except OSError as error:
            raise RunError(
                f"{self.out}: the result cannot be moved there: {error.strerror or error}. It is still in {self.partial}. "
                f"Remove or move what is in {self.out}, then go on with --resume"
            ) from None
        sync_folder(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove OUT.partial/, with its mark and its lock last.

        So a later run knows that the rest is useless.
        """
        for path in [*(p for p in self.partial.iterdir() if p.name not in (MOVING, *KEPT)), self.partial]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def settle(self) -> bool:
        """Return whether OUT is finished and its run has nothing left to do.

        Remove a useless OUT.partial/.
        """
        if self.finished() and self.partial.is_dir():
            self._refuse_strange()
            moved = (self.partial / MOVING).is_file() and not self.ready.exists()
            if not moved and (self.partial / "state.json").is_file():
                return False
            self.overwrite = True
            with self.locked() if self.writes else nullcontext():
                if self.writes:
                    self.discard()
        return self.finished()


def is_ours(out: Path) -> bool:
    """Return whether a directory is the output of a run.

    A file dsd/report.json is not enough: it must be a report.
    """
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and {"schema", "verdict", "output", "source", "arms"} <= report.keys()


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.pop("sha256", None) != _digest(state):
            raise ValueError(CHANGED)
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(file, error) from None
    return state


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _unusable(file: Path, error: Exception) -> UsageError:
    return UsageError(f"{file}: the saved state cannot be used ({error!s:.200}); start anew with --overwrite")


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _refuse_difference(saved: dict[str, Any], now: dict[str, Any]) -> None:
    different = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if different:
        lines = "; ".join(f"{key} was {saved.get(key)!r:.80}, is {now.get(key)!r:.80}" for key in different)
        raise UsageError(
            f"--resume: the saved run differs from this one: {lines}. Run it as it was, or start anew with --overwrite"
        )
