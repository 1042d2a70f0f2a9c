"""A task is one file and one entry in `task_specs.TASKS`; a library is one adapter. Nothing else
asks for either by name.
"""

import ast
import importlib
import json
import re

import builders
import pytest
import transformers
from conftest import ROOT, process
from transformers.models.auto import modeling_auto

from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.recipe import read_recipe, shipped
from dsd_refine.task_specs import TASKS, TaskSpec
from dsd_refine.tasks.registry import KINDS

PACKAGE = ROOT / "dsd_refine"
BRIGHTNESS = TaskSpec(
    name="brightness",
    opener="brightness:open_task",
    columns=("image",),
    auto_class="AutoModelForImageClassification",
    model_list="image-classification",
    endings=(),
    processor="AutoImageProcessor",
    pipeline_tag="image-feature-extraction",
    libraries=("timm", "transformers"),
)
ABC = [["a"], ["b"], ["c"]]
RECIPE = """\
# Default of brightness.
task: brightness
phases:
  - {kind: sparse, steps: 3, lr: 0.01, sparsity: 0.5}
  - {kind: dense, steps: 2, lr: 0.001}
"""


@pytest.fixture
def brightness(monkeypatch, tmp_path):
    """The toy task of tests/support/brightness.py, registered for one test, with its default
    recipe.
    """
    from dsd_refine import recipe

    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/brightness.yaml").write_text(RECIPE)
    monkeypatch.setitem(TASKS, "brightness", BRIGHTNESS)
    monkeypatch.setattr(recipe, "recipes_folder", lambda: tmp_path / "recipes")


@pytest.mark.parametrize("source", ["timm", "vit"])
def test_a_new_task_is_one_file_and_one_entry(command, brightness, made, tmp_path, source):
    out, data = tmp_path / "out", made / ("pictures" if source == "timm" else "colours")
    args = (made / source, "--task", "brightness", "--data", data)
    plan = command("plan", *args, "--json")
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["task"] == "brightness"
    found = command(*args, "-o", out, "--gate", "none", "--device", "cpu", "--batch-size", "8")
    assert found.code == 0, found.err
    assert "recipe: brightness (the default of brightness)" in found.err
    report = json.loads((out / "dsd/report.json").read_text())
    assert (report["task"], report["metric"]) == ("brightness", {"name": "loss", "higher_is_better": False})
    first = next(layer for layer in report["layers"] if layer["excluded"] and "first" in layer["excluded"])
    assert first["masked"] == 0  # pixels go in, so the first layer is never masked
    sparse = next(phase for phase in report["phases"] if phase["arm"] == "refined" and phase["kind"] == "sparse")
    assert 0.45 < sparse["measured_sparsity"] <= 0.5
    assert "pipeline_tag: image-feature-extraction" in (out / "README.md").read_text()
    again = command("verify", made / source, out)
    assert again.code == 0, again.out


def test_a_new_task_refuses_options_that_it_has_no_use_for(refused, brightness, made):
    args = (made / "timm", "--task", "brightness", "--data", made / "pictures")
    assert "brightness cuts none" in refused(*args, "--max-length", 4)
    assert "brightness has none" in refused(*args, "--set", "label_map={a: b}")
    assert "reads columns of image, and no label" in refused(*args, "--label-column", "label")


def test_a_task_is_known_to_the_recipe_schema_only_while_it_is_registered(refused, made, tmp_path):
    (tmp_path / "toy.yaml").write_text(RECIPE)
    said = refused(made / "timm", "--data", made / "pictures", "--recipe", tmp_path / "toy.yaml")
    assert "the recipe toy is for brightness" in said
    assert "not a task; known are image-classification" in refused(made / "timm", "--task", "brightness")


@pytest.mark.parametrize("name", TASKS)
def test_every_entry_is_complete(name):
    spec = TASKS[name]
    assert spec.name == name
    module, function = spec.opener.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert set(spec.columns) <= set(KINDS)
    assert hasattr(transformers, spec.auto_class)
    assert hasattr(transformers, spec.processor)
    lists = {key.lower().replace("_", "-") for key in vars(modeling_auto) if key.endswith("MAPPING_NAMES")}
    assert (f"model-for-{spec.model_list}-mapping-names" if spec.model_list else "model-mapping-names") in lists
    assert read_recipe(shipped()[name])["task"] == name


def test_the_help_names_every_task_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom dsd_refine.cli.app import main\nsys.argv = ['dsd-refine', 'run', '--help']\ntry:\n    main()\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'timm', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = process("-c", code)
    assert done.stdout.rstrip().endswith("[]"), done.stdout
    assert all(name in re.sub(r"-\s+", "-", done.stdout) for name in TASKS)


@pytest.mark.parametrize(
    ("make", "names", "classes"),
    [
        (builders.timm_checkpoint, ABC, 3),
        (builders.torchvision_checkpoint, ABC, 3),
        (builders.vit_checkpoint, ABC, 3),
        (lambda folder: builders.bert_checkpoint(folder, 4), None, 4),  # LABEL_0 and so on are no names
    ],
    ids=["timm", "torchvision", "transformers", "transformers, no names"],
)
def test_every_adapter_answers_all_that_is_asked_of_a_library(tmp_path, make, names, classes):
    make(tmp_path / "m")
    library = open_library(find_source(str(tmp_path / "m")))
    model = library.build_meta()
    assert next(model.parameters()).is_meta
    assert library.label_names() == (names, classes)
    assert "import" in library.snippet()
    assert library.warnings(model) == []
    assert all(isinstance(name, str) for name in library.names)
    plain = library.load_plain(tmp_path / "m").state_dict()
    tensors = {name: tensor.clone() for name, tensor in plain.items()}
    loaded = library.load(tensors, next(iter(plain.values())).dtype).state_dict()
    assert all(plain[name].equal(loaded[name]) for name in plain)


def imports(path):
    """(module, line) of every import of this package in a file, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dsd_refine"):
            yield node.module, node.lineno


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("checkpoint/*.py", ("checkpoint.libraries", "data", "tasks", "masking", "training", "run")),
        ("checkpoint/libraries/*.py", ("checkpoint.checkpoint", "tasks", "masking", "training", "run")),
        ("data/*.py", ("checkpoint", "tasks", "masking", "training", "run")),
        ("tasks/**/*.py", ("checkpoint.libraries", "masking", "training", "run", "evidence", "report")),
    ],
)
def test_imports_between_these_rooms_run_down(room, never):
    upward = [
        f"{path.name}:{line} imports {module}"
        for path in PACKAGE.glob(room)
        for module, line in imports(path)
        if any(f"{module}.".startswith(f"dsd_refine.{name}.") for name in never)
    ]
    assert upward == []


def test_only_the_adapters_and_the_source_know_the_libraries_by_name():
    asked = re.compile(r"library\.name\b|getattr\([\w.]*library\b")
    hits = [path for path in PACKAGE.rglob("*.py") if "libraries" not in path.parts and asked.search(path.read_text("utf-8"))]
    assert hits == []
