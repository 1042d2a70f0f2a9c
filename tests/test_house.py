"""The rooms of the package: arrows run down, the map in CONTRIBUTING is the one that the imports draw, names do not collide."""

import ast
import re
from pathlib import Path

import pytest
import rooms
from conftest import ROOT

import dsd_refine


def test_arrows_between_rooms_run_down():
    floors = rooms.floors(rooms.arrows())
    level = {room: number for number, floor in enumerate(floors) for room in floor}
    assert level["errors"] == 0
    order = ["cli", "api", "planning", "method", "run", "training", "tasks", "checkpoint.libraries", "checkpoint", "errors"]
    assert [level[room] for room in order] == sorted((level[room] for room in order), reverse=True)


def test_a_circle_is_told():
    with pytest.raises(ValueError, match="a, b"):
        rooms.floors({"a": {"b"}, "b": {"a"}, "c": set()})


def test_the_map_in_contributing_is_drawn_from_the_imports():
    text = Path(ROOT, "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert rooms.START + rooms.drawing() + rooms.END in text, "python tests/support/rooms.py --write"


def test_every_room_says_what_it_is_for():
    for room in rooms.arrows():
        path = rooms.modules(ROOT)[f"dsd_refine.{room}" if room != "__init__" else "dsd_refine"]
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), room


def test_an_init_only_hands_names_on():
    for path in Path(ROOT, "dsd_refine").rglob("__init__.py"):
        if path.parent.name == "dsd_refine":
            continue
        kinds = (ast.Expr, ast.ImportFrom, ast.Assign)
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(node, kinds) for node in body), path
        assert all(node.targets[0].id == "__all__" for node in body if isinstance(node, ast.Assign)), path


def test_no_module_at_the_root_bears_the_name_of_a_public_one():
    package = Path(ROOT, "dsd_refine")
    names = {path.stem if path.suffix == ".py" else path.name for path in package.iterdir()}
    assert not names & set(dsd_refine.__all__)


def test_no_test_file_imports_another():
    """What several test files need lies in tests/support."""
    imports = re.compile(r"^\s*(?:from|import) test_\w+", re.MULTILINE)
    assert [
        path.name for path in Path(ROOT, "tests").glob("test_*.py") if imports.search(path.read_text(encoding="utf-8"))
    ] == []
