"""A run's life on disk: everything in OUT.partial/, one rename at the end, and enough state to go on after a stop.

State is safetensors and JSON, never pickle; each save has a name of its own, is synced, and becomes the state by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from safetensors.torch import load_file, save

from dsd_refine.checkpoint.write import sync, sync_folder
from dsd_refine.errors import RunError, UsageError

REPORT = "dsd/report.json"
SAVE_EVERY = 600.0  # seconds between saves inside a phase


class Workspace:
    """OUT and its sibling OUT.partial/. Only the main process writes (`writes`); the others read.

    `state` is the JSON part of the saved state: empty for a new run.
    """

    def __init__(self, out: Path, *, writes: bool = True) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.writes = writes
        self.state: dict[str, Any] = {}
        self.last_save = time.monotonic()

    @property
    def ready(self) -> Path:
        """The folder that the final rename publishes."""
        return self.partial / "out"

    @property
    def log_file(self) -> Path:
        return self.partial / "log.jsonl"

    def finished(self) -> bool:
        """Does OUT hold a finished run?"""
        return (self.out / REPORT).is_file()

    def check_target(self, source: Path, *, resume: bool, overwrite: bool) -> None:
        """Refuse an OUT that is the source, or that holds something, before anything is done.

        Raises:
            UsageError: names the directory and what to do.
        """
        out = self.out.resolve()
        if out == source.resolve() or source.resolve() in out.parents or out in source.resolve().parents:
            raise UsageError(f"{self.out}: the output would lie in or over the source; give another --output-dir")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise UsageError(f"{self.out}: is not empty; give another --output-dir, or --overwrite")
            if not self.finished():
                raise UsageError(f"{self.out}: holds no report of ours, so --overwrite will not remove it; remove it yourself")
        elif self.out.exists() and not out.is_dir():
            raise UsageError(f"{self.out}: is a file; give another --output-dir")
        if self.partial.exists() and not (resume or overwrite):
            raise UsageError(f"{self.partial}: an unfinished run is there; go on with --resume, or start anew with --overwrite")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold OUT.partial/ for this process.

        Raises:
            UsageError: another process works there, or the place cannot be written.
        """
        lock = filelock.FileLock(self.partial / "lock", mode=0o666 & ~umask())
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            holder = self.partial / "pid"
            who = f" (process {holder.read_text().strip()})" if holder.is_file() else ""
            raise UsageError(f"{self.partial}: another run{who} is at work there") from None
        except OSError as error:
            raise UsageError(f"{self.partial}: cannot be written: {error.strerror or error}") from None
        try:
            (self.partial / "pid").write_text(f"{os.getpid()}\n")
            yield
        finally:
            lock.release()

    def begin(self, identity: dict[str, Any], resume: bool) -> None:
        """Start anew, or take up the saved state if `resume` and there is one.

        Raises:
            UsageError: the saved run had another recipe, source, data or library version; the difference is named.
        """
        file = self.partial / "state.json"
        if resume and file.is_file():
            self.state = json.loads(file.read_text())
            _refuse_difference(self.state["identity"], identity)
        elif self.writes:
            self.clear()
        self.state.setdefault("identity", identity)
        if self.writes:
            self._cut_log()

    def clear(self) -> None:
        """Remove what an earlier run left in OUT.partial/."""
        for path in self.partial.iterdir():
            if path.name not in ("lock", "pid", "cache"):
                remove(path)

    def abandon(self) -> None:
        """Remove OUT.partial/ after a run that trained nothing, unless an earlier run's state is in it."""
        if not (self.partial / "state.json").is_file():
            remove(self.partial)

    def _cut_log(self) -> None:
        with self.log_file.open("ab") as file:
            file.truncate(self.state.get("log_bytes", 0))

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to log.jsonl and flush it."""
        if self.writes:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save_due(self) -> bool:
        return time.monotonic() - self.last_save > SAVE_EVERY

    def save(self, tensors: dict[str, torch.Tensor] | None) -> None:
        """Save `state`, and the tensors that belong to it (None: none do, as between phases)."""
        self.last_save = time.monotonic()
        if not self.writes:
            return
        number = int(self.state.get("save", 0)) + 1
        old, self.state["save"] = self.state.get("tensors"), number
        self.state["log_bytes"] = self.log_file.stat().st_size
        self.state["tensors"] = None
        if tensors is not None:
            self.state["tensors"] = f"state-{number}.safetensors"
            self.write_tensors(self.state["tensors"], tensors)
        replace_text(self.partial / "state.json", json.dumps(self.state))
        if old and old != self.state["tensors"]:
            (self.partial / old).unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a safetensors file into OUT.partial/ whole or not at all (aliases are stored each by itself)."""
        if self.writes:
            own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
            replace_bytes(self.partial / name, save(own))

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.partial / name)

    def publish(self, *, overwrite: bool) -> None:
        """Make OUT appear by one rename, then remove OUT.partial/."""
        for folder in [*(p for p in self.ready.rglob("*") if p.is_dir()), self.ready]:
            sync_folder(folder)
        if overwrite and self.finished():
            os.replace(self.out, self.partial / "replaced")
        os.replace(self.ready, self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self.partial)


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refuse_difference(saved: dict[str, Any], now: dict[str, Any]) -> None:
    different = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if different:
        lines = "; ".join(f"{key} was {saved.get(key)!r:.80}, is {now.get(key)!r:.80}" for key in different)
        raise UsageError(f"--resume: the saved run differs from this one: {lines}. Start anew with --overwrite")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that at every moment it holds the old text or the new."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """The same for bytes. Raises RunError where they cannot be written (no room, a read-only place)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot write {len(data):,} bytes: {error.strerror or error}") from None


def umask() -> int:
    """The process's umask (there is no way to read it but to set it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def pack_masks(masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks as bits, eight to a byte, in logical order."""
    return {
        f"mask.{key}": torch.from_numpy(np.packbits(mask.cpu().contiguous().view(-1).numpy())) for key, mask in masks.items()
    }


def unpack_masks(tensors: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masks of `pack_masks`, with the shapes, strides and device of their parameters."""
    masks = {}
    for name, bits in tensors.items():
        if name.startswith("mask."):
            parameter = parameters[name.removeprefix("mask.")]
            flags = torch.from_numpy(np.unpackbits(bits.numpy(), count=parameter.numel()).astype(bool))
            masks[name.removeprefix("mask.")] = torch.empty_like(parameter, dtype=torch.bool).copy_(
                flags.reshape(parameter.shape)
            )
    return masks


def pack_optimizer(optimizer: Any) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat tensors: `optimizer.NUMBER.FIELD`."""
    found = {}
    for number, fields in optimizer.state_dict()["state"].items():
        for field, value in fields.items():
            if value is not None:
                found[f"optimizer.{number}.{field}"] = torch.as_tensor(value)
    return found


def unpack_optimizer(tensors: dict[str, torch.Tensor], optimizer: Any) -> None:
    """Put `pack_optimizer`'s tensors back, in place."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".", 2)
            state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Signals:
    """SIGTERM and SIGINT ask the run to stop after its step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
