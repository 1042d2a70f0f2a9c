"""What a run does no more often than it must: imports, loads, decodings, evaluations. Times are benchmarks' (benchmarks/)."""

import json
from collections import Counter

import pytest
from conftest import SHORT, process

from dsd_refine.checkpoint.timm import TimmLibrary
from dsd_refine.tasks import images

EPOCHS = ("--sparse-epochs", "2", "--dense-epochs", "1", "--gate", "none", "--device", "cpu", "--quiet", "--batch-size", "8")


@pytest.mark.parametrize(
    ("model", "data", "absent"), [("timm", "pictures", ("transformers",)), ("bert", "texts.csv", ("timm",))]
)
def test_a_task_does_not_import_the_other_library(made, tmp_path, model, data, absent):
    code = (
        "import sys\nfrom dsd_refine.app import main\ntry:\n    main()\n"
        f"finally:\n    print('imported', [m for m in {absent!r} if m in sys.modules], file=sys.stderr)"
    )
    done = process("-c", code, made / model, "--data", made / data, "-o", tmp_path / "out", *SHORT, "--gate", "none", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "imported []" in done.stderr


def test_a_picture_is_decoded_once_an_epoch_and_arm_at_most(command, made, tmp_path, monkeypatch):
    """And once more when the rows are looked through."""
    seen: Counter[bytes] = Counter()
    decode = images.decode

    def counted(raw, channels):
        seen[raw] += 1
        return decode(raw, channels)

    monkeypatch.setattr(images, "decode", counted)
    found = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *EPOCHS, "--control", "dense")
    assert found.code == 0, found.err
    data = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]
    files = {path.read_bytes() for path in (made / "pictures/train").rglob("*.png")}
    taken = sorted(seen[raw] for raw in files)
    assert len(taken) == data["train"]["rows"] + data["holdout"]["rows"]
    assert taken[-1] <= 1 + 2 * 3 + 2  # rows, arms x epochs, the first look at gradients and the probe of the source
    assert sum(taken) <= len(taken) * (1 + 2 * 3) + 4


def test_the_source_is_loaded_once_whatever_the_arms(command, made, tmp_path, monkeypatch):
    """By us; its own library loads it once as a user does, and the output once."""
    loads: Counter[str] = Counter()
    for name in ("load", "load_plain"):
        real = getattr(TimmLibrary, name)

        def counted(self, *given, real=real, name=name):
            loads[name] += 1
            return real(self, *given)

        monkeypatch.setattr(TimmLibrary, name, counted)
    arms = ("--control", "dense", "--control", "random", "--seeds", "2")
    found = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--gate", "none", *arms)
    assert found.code == 0, found.err
    assert loads == {"load": 1, "load_plain": 2}
