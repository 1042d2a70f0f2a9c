"""What every test shares: no network, no cache of the user's, the command in-process, and a few things made once."""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_HOME = tempfile.mkdtemp(prefix="dsd-refine-home-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": _HOME, "HF_DATASETS_CACHE": f"{_HOME}/datasets", "OMP_NUM_THREADS": "1"}
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
    os.environ.pop(_name, None)

from dsd_refine.cli.app import ENVIRONMENT  # noqa: E402

# as for the command: the libraries read these when they are imported, and what follows imports them
os.environ |= ENVIRONMENT

import builders  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent
SHORT = ("--sparse-steps", "3", "--dense-steps", "2", "--gate", "none", "--batch-size", "8", "--device", "cpu")


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tests run side by side on few cores; models this small gain nothing from threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """No test cuts the power. Those that look at what was synced put their own `os.fsync` in this one's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture
def command(capfd):
    """Run the command in this process: `command("plan", folder)` -> Result."""

    def run(*args):
        from dsd_refine.cli.app import main

        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Result(ended.value.code, out, err)

    return run


@pytest.fixture
def refused(command):
    """Run the command, expect exit code 2 and a short message without a traceback; returns the message."""

    def run(*args):
        found = command(*args)
        assert found.code == 2, found.err
        assert found.out == ""
        assert "Traceback" not in found.err
        message = found.err.split("Error: ", 1)[1].strip()
        assert len(message.splitlines()) <= 8
        return message

    return run


def process(*args, timeout=300, **env):
    """Run the command as a process of its own; returns subprocess.CompletedProcess."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout
    )


def environment(**more):
    """The environment of a child process: the checkout is importable, one thread each."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def hashes(folder):
    """Relative name -> SHA-256 of every file below a folder."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Read-only sources and data, each made once: timm, bert, gpt2, vit; pictures (grey), colours, texts, documents."""
    place = tmp_path_factory.mktemp("made")
    builders.timm_checkpoint(place / "timm")
    builders.bert_checkpoint(place / "bert")
    builders.gpt2_checkpoint(place / "gpt2")
    builders.vit_checkpoint(place / "vit")
    builders.image_folder(place / "pictures")
    builders.image_folder(place / "colours", channels=3)
    builders.text_csv(place / "texts.csv")
    builders.text_file(place / "documents.txt")
    return place


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Options that give the demo's recipe with some rows of its data, for a trained source and few steps."""
    import pyarrow.parquet as pq

    place = tmp_path_factory.mktemp("digits")
    for name, rows in (("train", 200), ("test", 60)):
        pq.write_table(pq.read_table(ROOT / "recipes/demo" / f"{name}.parquet").slice(0, rows), place / f"{name}.parquet")
    return ["--recipe", "digits", "--data", place / "train.parquet", "--eval-data", place / "test.parquet"]


@pytest.fixture(scope="session")
def finished(made, tmp_path_factory):
    """OUT of a finished timm run with its phases kept. Do not change it."""
    from dsd_refine.cli.app import main

    out = tmp_path_factory.mktemp("finished") / "out"
    args = [made / "timm", "--data", made / "pictures", "-o", out, *SHORT, "--save-phases", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    assert ended.value.code == 0
    return out
