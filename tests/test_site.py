"""The site of the documentation: it builds without a warning, asks for nothing of the network, and its reference is complete."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, environment

import dsd_refine
from dsd_refine.cli.app import cli
from dsd_refine.recipe import Recipe

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. mkdocs ends with an error after a warning."""
    place = tmp_path_factory.mktemp("site") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", place]
    done = subprocess.run(build, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return place


@pytest.fixture(scope="module")
def pages():
    """The module that writes the pages of the reference."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import pages
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return pages


def test_every_page_is_there(site):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").is_file()
    assert "When to use it, and when not" in (site / "index.html").read_text("utf-8")
    assert (site / "report-desktop.png").is_file()
    assert not list(site.rglob("*.py"))


def test_it_loads_nothing_from_elsewhere(site):
    loads = re.compile(r"""(?:<(?:script|img|iframe)[^>]+src|<link[^>]+rel=.?stylesheet.?[^>]+href)=["']?(?:https?:)?//""")
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text("utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet


def test_the_reference_has_every_verb_option_field_and_name(site):
    command, recipe, python = (
        (site / f"reference/{name}/index.html").read_text("utf-8") for name in ("command", "recipe", "python")
    )
    for verb in cli.commands.values():
        for parameter in verb.params:
            assert all(option in command for option in parameter.opts if option.startswith("-"))
    assert all(f"<code>{name}</code>" in recipe for name in Recipe.model_fields)
    assert all(f'id="dsd_refine.{name}"' in python for name in dsd_refine.__all__ if name != "__version__")


def test_every_field_of_a_recipe_has_a_meaning(pages):
    for model in pages.MODELS:
        meanings = pages.field_meanings(model)
        assert [name for name in model.model_fields if not meanings.get(name)] == [], model.__name__


def test_a_link_out_of_docs_becomes_a_name(site):
    text = (site / "ci/index.html").read_text("utf-8")
    assert "on a release (<code>examples/ci/release.yml</code>)" in text
