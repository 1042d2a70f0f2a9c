"""Refine real released checkpoints on real data: `python benchmarks/realdata.py RELEASED DATA [OUT] [NAME …]`.

RELEASED holds checkpoint folders (digits5k, elpv, tweets), DATA the data of the same names. Prints each run's summary, what
`verify` says, and the class that plain timm or transformers loads the output as, for benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLAIN = ("--set", "augment={crop: none, flip: 0.0}", "--warmup-steps", "0", "--gate", "none", "--sparsity", "0.3")
OPTIONS = {
    "digits5k": ("--sparse-epochs", "4", "--dense-epochs", "4", "--lr", "0.15", "--weight-decay", "0.0005"),
    "elpv": ("--sparse-epochs", "2", "--dense-epochs", "2", "--lr", "0.03", "--batch-size", "32"),
    "tweets": ("--sparse-steps", "60", "--dense-steps", "30", "--lr", "2e-5", "--max-length", "48"),
}


def command(*args: str) -> str:
    """Run the command; its stdout, with the exit code where it is not 0."""
    done = subprocess.run([sys.executable, str(ROOT / "cli.py"), *args], capture_output=True, text=True, check=False)
    return done.stdout + ("" if done.returncode == 0 else f"exit code {done.returncode}\n{done.stderr[-2000:]}\n")


def loads_plainly(source: Path, out: Path) -> str:
    """Load the output with nothing of ours and name its class."""
    if "architecture" in json.loads((source / "config.json").read_text()):
        import timm

        return type(timm.create_model(f"local-dir:{out}", pretrained=True)).__name__
    from transformers import AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    return type(AutoModelForSequenceClassification.from_pretrained(out)).__name__


def main() -> None:
    released, data, out = (Path(path) for path in [*sys.argv[1:3], *sys.argv[3:4]])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}, Python {platform.python_version()}, {versions}\n")
    for name in sys.argv[4:] or list(OPTIONS):
        target, started = out / name, time.time()
        run = ("--data", str(data / name), "-o", str(target), "--overwrite", "--quiet")
        options = (*OPTIONS[name], *PLAIN)
        print(f"$ dsd-refine {name} {' '.join(options)}\n")
        print(command(str(released / name), *run, *options).replace(f"{released}/", "").replace(f"{out}/", ""))
        print(f"verify: {command('verify', str(released / name), str(target)).replace(f'{out}/', '')}", end="")
        print(f"plain load: {loads_plainly(released / name, target)}; {time.time() - started:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
