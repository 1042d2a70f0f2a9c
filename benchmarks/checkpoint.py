"""Opening, writing and verifying a checkpoint: `python benchmarks/checkpoint.py [--quick] [--place FOLDER]`.

A ResNet-50 of 100 MB in one file and a GPT-2 of 2 GB in five shards, all weights changed. Writing with fsync against a plain
copy of the same files with fsync; `verify` against reading the weight files once, from the disk and from memory (hashing, which
no file can do without, is shown beside it); and the most anonymous memory of each against the model's float32 bytes and
those with one shard. PLACE decides on which disk (the system's temporary folder).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import ROOT, Peak, arguments, copy_synced, interleaved, machine, middle, ratio, table, verdict
from made import pictures, timm_folder, word_tokenizer, words

from dsd_refine.checkpoint import verify
from dsd_refine.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_shapes
from dsd_refine.checkpoint.layout import read_layout
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.safetensors_file import all_finite
from dsd_refine.checkpoint.source import find_source
from dsd_refine.checkpoint.verify import PROBE, load_probe
from dsd_refine.files import sha256_files
from dsd_refine.forward import logits_of

BLOCK = 1 << 22
RUN = (
    "--holdout",
    "0",
    "--keep",
    "last",
    "--sparse-steps",
    "0",
    "--dense-steps",
    "0",
    "--control",
    "none",
    "--gate",
    "none",
    "--device",
    "cpu",
    "--quiet",
)


def resnet(folder: Path, quick: bool) -> tuple[Path, list[Any]]:
    """100 MB in one file, and a run's options."""
    size = 64
    pictures(folder / "data/train", 40, size)
    pictures(folder / "data/test", 20, size, seed=1)
    model = timm_folder(folder / "model", "resnet18" if quick else "resnet50", 10, size)
    return model, ["--data", folder / "data"]


def gpt2(folder: Path, quick: bool) -> tuple[Path, list[Any]]:
    """2 GB in five shards, and a run's options."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers = 2 if quick else 25
    torch.manual_seed(0)
    shape = {"n_embd": 1280, "n_layer": layers, "n_head": 20, "vocab_size": 2005, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=2, eos_token_id=3))
    model.save_pretrained(folder / "model", max_shard_size="50MB" if quick else "420MB")
    word_tokenizer(64).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(words(20, 30)))
    return folder / "model", ["--data", folder / "text.txt", "--max-length", "32"]


def command(*args: Any) -> None:
    done = subprocess.run([sys.executable, ROOT / "cli.py", *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run to verify failed: {done.stderr[-1000:]}")


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read(paths: Iterable[Path], hashed: bool = False) -> None:
    """All bytes once, hashed or not."""
    buffer, digest = bytearray(BLOCK), hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if hashed:
                    digest.update(memoryview(buffer)[:count])


def forget(folder: Path) -> None:
    """Take a folder's files out of the system's cache, so that the disk is read."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def opened(model: Path, shapes: bool = False) -> Checkpoint:
    source = find_source(str(model))
    return (open_shapes if shapes else open_checkpoint)(source, open_library(source))


def changed(checkpoint: Checkpoint) -> Checkpoint:
    """Every weight moved, as training does."""
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.mul_(1.0001).add_(1e-6)
    return checkpoint


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def copy(model: Path, target: Path) -> None:
    for path in [path for path in model.iterdir() if path.is_file()]:
        copy_synced(path, target / path.name)


def checked(model: Path, out: Path) -> None:
    problems = verify(opened(model, shapes=True), out)
    if problems:
        sys.exit(f"verify: {problems}")


def writing(checkpoint: Checkpoint, model: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Into an empty folder each time; what was there is removed before the clock runs."""
    ways: dict[str, Callable[[Path], object]] = {
        "ours": lambda target: checkpoint.write(checkpoint.model, target),
        "copy": lambda target: copy(model, target),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name, work in ways.items():
            target = fresh(folder / name)
            seconds = interleaved({name: lambda work=work, target=target: work(target)}, 1, warm=0)[name]
            found[name] += seconds if number >= 0 else []
    for name in ways:
        shutil.rmtree(folder / name)
    return found


def verifying(model: Path, out: Path, rounds: int) -> dict[str, list[float]]:
    """Cold: each way finds nothing in the cache. Warm: everything."""
    checkpoint = opened(model, shapes=True)
    plain = checkpoint.library.load_plain(out).eval()
    examples = [inputs for inputs, _ in load_probe(out / PROBE).values()]
    ways = {
        "read": lambda: read(weights(model)),
        "verify": lambda: checked(model, out),
        "hash both": lambda: sha256_files([*weights(model), *weights(out)]),
    }
    found: dict[str, list[float]] = {f"{name} cold": [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            forget(model)
            forget(out)
            found[f"{name} cold"] += interleaved({name: work}, 1, warm=0)[name]
    alone = {
        "hash": lambda: read(weights(model), hashed=True),
        "shapes": lambda: opened(model, shapes=True),
        "load": lambda: checkpoint.library.load_plain(out),
        "finite": lambda: [all_finite(tensor) for file in read_layout(out).files for tensor in file.mapped().values()],
        "examples": lambda: [answered(plain, inputs) for inputs in examples],
    }
    return found | interleaved({**ways, **alone}, rounds)


@torch.no_grad()
def answered(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits_of(model, inputs)


def held(what: str, model: Path, out: Path) -> int:
    """The most anonymous memory of one deed, in a process of its own."""
    arguments = [sys.executable, __file__, "--held", what, "--model", str(model), "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def deed(what: str, model: Path, out: Path) -> int:
    """In that process, where everything is imported before the memory is looked at."""
    opened(model, shapes=True)
    if what == "verify":
        with Peak() as peak:
            checked(model, out)
        return peak.bytes
    with Peak() as peak:
        checkpoint = opened(model)
        if what == "write":
            changed(checkpoint).write(checkpoint.model, fresh(out.parent / "held"))
    if what == "write":
        shutil.rmtree(out.parent / "held")
    return peak.bytes


def measure(title: str, made: tuple[Path, list[Any]], folder: Path, rounds: int) -> None:
    """One checkpoint's table."""
    model, options = made
    out = folder / "out"
    command(model, *options, "-o", out, *RUN)
    sizes = [path.stat().st_size for path in weights(model)]
    total, shard = sum(sizes), max(sizes)
    times = interleaved({"open": lambda: opened(model)}, rounds)
    checkpoint = changed(opened(model))
    times |= writing(checkpoint, model, folder, rounds)
    del checkpoint
    times |= verifying(model, out, rounds)
    memory = {what: held(what, model, out) for what in ("open", "write", "verify")}

    def line(name: str, key: str, base: str | None = None, what: str | None = None) -> list[str]:
        seconds = median(times[key])
        bound = [f"{memory[what] / 1e6:.0f} MB", f"{memory[what] / (total + shard):.2f}"] if what else ["", ""]
        return [name, f"{seconds:.2f}", f"{total / seconds / 1e6:.0f}", ratio(times, key, base) if base else "", *bound]

    table(
        f"{title}: {total / 1e6:.0f} MB in {len(sizes)} file{'s' * (len(sizes) > 1)}",
        ["", "seconds", "MB/s", "ratio", "most memory", "x (model + shard)"],
        [
            line("open", "open", None, "open"),
            line("plain copy, fsync", "copy"),
            line("write, fsync (/ copy)", "ours", "copy", "write"),
            line("read once, from disk", "read cold"),
            line("verify, from disk (/ read)", "verify cold", "read cold", "verify"),
            line("  of it: hash both sides (/ read)", "hash both cold", "read cold"),
            line("  the library loads it (/ read)", "load", "read cold"),
            line("read once, cached", "read"),
            line("hash once, cached (/ read)", "hash", "read"),
            line("verify, cached (/ read)", "verify", "read"),
        ],
    )
    typical = {name: median(found) for name, found in times.items()}
    verdict("write and fsync / plain copy and fsync", middle(times, "ours", "copy"), 1.3)
    print(
        f"  the limit: SHA-256 of what is written, on one core, takes {typical['hash'] / typical['copy']:.2f}; a sync follows"
    )
    verdict("verify / reading the files once, from disk", middle(times, "verify cold", "read cold"), 4.0)
    named = {"hash both cold": "hashing both sides", "shapes": "the source's shapes", "load": "the library's own loading"}
    named |= {"finite": "looking for what is not finite", "examples": "the examples"}
    parts = ", ".join(f"{text} {typical[name] / typical['read cold']:.2f}" for name, text in named.items())
    print(f"  the limit, each part alone: {parts}")
    verdict("the same, cached", middle(times, "verify", "read"), 4.0)
    print(f"  the limit: hashing both sides {typical['hash both'] / typical['read']:.2f}")
    for what, most in memory.items():
        verdict(f"{what}: most anonymous memory / (float32 model + one shard)", most / (total + shard), 1.1)


def main() -> None:
    inner = {"held": ("", "in a process of its own"), "model": ("", "of --held"), "out": ("", "of --held")}
    given = arguments(__doc__, 7, place=("", "where the files go"), **inner)
    if given.held:
        print(json.dumps(deed(given.held, Path(given.model), Path(given.out))))
        return
    print(machine())
    for title, make in (("ResNet-50", resnet), ("GPT-2 of 25 layers, 1280 wide", gpt2)):
        with tempfile.TemporaryDirectory(prefix="dsd-bench-", dir=given.place or None) as folder:
            measure(title, make(Path(folder), given.quick), Path(folder), given.rounds)


if __name__ == "__main__":
    sys.exit(main())
