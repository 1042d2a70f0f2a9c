"""What an installed package holds: the recipes and the demo's files, and no name of the user's own taken."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place / "dist"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = (place / "dist").iterdir()
    with zipfile.ZipFile(path) as file:
        file.extractall(place / "site")
    return place / "site"


def installed(wheel, *args):
    """Python with the wheel's files alone in front of the path, outside the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    return subprocess.run([sys.executable, *map(str, args)], cwd=wheel.parent, env=environment, capture_output=True, text=True)


def below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_every_recipe_and_the_demo_are_in_it(wheel):
    files = {name for name in below(ROOT / "recipes") if not name.endswith(".py")}
    assert {"digits.yaml", "demo/train.parquet", "demo/checkpoint/model.safetensors", "demo/checkpoint/config.json"} <= files
    assert below(wheel / "dsd_refine/recipes") == files
    assert (wheel / "dsd_refine/py.typed").is_file()


def test_it_takes_one_name(wheel):
    (info,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"dsd_refine", info.name}
    assert "dsd-refine = dsd_refine.cli.app:main" in (info / "entry_points.txt").read_text()
    for name in ("cli", "recipes"):  # without site-packages (-S): how the checkout is installed says nothing of the wheel
        assert "ModuleNotFoundError" in installed(wheel, "-S", "-c", f"import {name}").stderr


def test_what_it_holds_refines(wheel):
    assert str(wheel) in installed(wheel, "-c", "import dsd_refine; print(dsd_refine.__file__)").stdout
    listed = installed(wheel, "-m", "dsd_refine", "recipes")
    assert listed.returncode == 0
    assert "digits" in listed.stdout
    model = wheel / "dsd_refine/recipes/demo/checkpoint"
    short = ("--sparse-steps", "1", "--dense-steps", "1", "--control", "none", "--gate", "none", "--device", "cpu", "--quiet")
    done = installed(wheel, "-m", "dsd_refine", "run", model, "--recipe", "digits", "-o", "out", *short)
    assert done.returncode == 0, done.stderr
    assert (wheel.parent / "out/model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size
