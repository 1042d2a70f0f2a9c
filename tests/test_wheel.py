"""What is released: wheel and sdist hold the same package, and a bare environment with what they ask for runs it."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT
from installed import install, link, needed
from packaging.requirements import Requirement

EXTRAS = ("captions", "rouge", "seq2seq", "speech", "tagging", "timm", "torchvision")


def build(checkout, place, *targets):
    command = [sys.executable, "-m", "hatchling", "build", "-d", place]
    subprocess.run(
        [*command, *(word for target in targets for word in ("-t", target))], cwd=checkout, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that has wheel and sdist of this checkout."""
    place = tmp_path_factory.mktemp("dist")
    build(ROOT, place, "wheel", "sdist")
    return place


@pytest.fixture(scope="module")
def wheel(built):
    """The wheel's files in a folder."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        file.extractall(built / "site")
    return built / "site"


@pytest.fixture(scope="module")
def requirements(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    lines = metadata.read_text("utf-8").split("\n\n")[0].splitlines()
    return [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]


@pytest.fixture(scope="module")
def programs(built, requirements, tmp_path_factory):
    """The programs of a bare environment: the wheel, and the packages of `pip install dsd-refine` without an extra."""
    place = tmp_path_factory.mktemp("bare")
    (path,) = built.glob("*.whl")
    return install(path, place / "venv", link(needed(requirements), place / "packages"))


def run(program, *args, cwd, **variables):
    """A program outside the checkout; the package is that of the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(program), *map(str, args)], cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=300
    )


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


def test_the_sdist_builds_the_same_wheel(built, wheel, tmp_path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        file.extractall(tmp_path, filter="data")
    (checkout,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    build(checkout, tmp_path / "dist", "wheel")
    (again,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(again) as file:
        contents = {name: file.read(name) for name in file.namelist() if not name.endswith("/RECORD")}
    assert contents == {name: (wheel / name).read_bytes() for name in below(wheel) if not name.endswith("/RECORD")}
    assert {"tests", "docs", "mkdocs.yml", "action.yml", "Makefile", "LICENSE"} <= {entry.name for entry in checkout.iterdir()}


def test_the_base_is_light_and_every_extra_is_in_all(requirements):
    base = needed(requirements)
    assert {"torch", "transformers"} <= base.keys()
    assert not {"timm", "torchvision", "soundfile", "jiwer", "sacrebleu", "seqeval", "scikit-learn"} & base.keys()

    def packages(extra):
        return {Requirement(text).name for text in requirements if f"extra == '{extra}'" in text}

    assert packages("all") == set().union(*map(packages, EXTRAS))


def test_the_installed_command_lists_its_recipes(programs, tmp_path):
    from dsd_refine import __version__

    assert run(programs / "dsd-refine", "--version", cwd=tmp_path).stdout.split()[-1] == __version__
    listed = run(programs / "dsd-refine", "recipes", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "digits" in listed.stdout
    for name in ("cli", "recipes"):  # names of the user's own
        assert "ModuleNotFoundError" in run(programs / "python", "-c", f"import {name}", cwd=tmp_path).stderr


# Commands one after the other in one process, because most of a short command is the import of torch.
COMMANDS = """
import json, sys
from dsd_refine.cli.app import main
for command in json.loads(sys.argv[1]):
    print("$", file=sys.stderr)
    try:
        main(command)
    except SystemExit as ended:
        print("code", ended.code, file=sys.stderr)
"""

SHORT = ["--sparse-steps", "1", "--dense-steps", "1", "--control", "none", "--gate", "none", "--device", "cpu", "--quiet"]


def test_without_an_extra_texts_are_refined_and_pictures_name_their_extra(programs, made, tmp_path):
    texts = ["run", str(made / "bert"), "--data", str(made / "texts.csv"), "-o", "out", *SHORT]
    wants = {
        "resnet50": "timm",
        str(made / "timm"): "timm",
        "torchvision:resnet18": "torchvision",
        str(made / "vit"): "torchvision",
    }
    asked = [["plan", model, "--data", str(made / "colours")] for model in wants]
    commands = json.dumps([texts, ["verify", str(made / "bert"), "out"], *asked])
    done = run(programs / "python", "-c", COMMANDS, commands, cwd=tmp_path)
    refined, verified, *refused = done.stderr.split("$\n")[1:]
    assert refined.endswith("code 0\n"), refined
    assert verified.endswith("code 0\n"), verified
    assert json.loads((tmp_path / "out/dsd/report.json").read_text())["environment"]["timm"] is None
    for extra, said in zip(wants.values(), refused, strict=True):
        assert said.endswith("code 2\n"), said
        assert f"pip install 'dsd-refine[{extra}]'" in said
        assert "Traceback" not in said


def test_with_its_extra_the_demo_that_it_holds_refines(programs, requirements, tmp_path):
    timm = link(needed(requirements, "timm"), tmp_path / "timm")
    (model,) = programs.parent.glob("lib/python*/site-packages/dsd_refine/recipes/demo/checkpoint")
    args = ["run", model, "--recipe", "digits", "-o", "out", *SHORT]
    done = run(programs / "dsd-refine", *args, cwd=tmp_path, PYTHONPATH=str(timm))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size
