"""What the documents name exists: files, tests, anchors, the version."""

import re

import pytest
import yaml
from conftest import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", ".pre-commit-config.yaml")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.*")),
]
SOURCES = [
    path
    for folder in ("dsd_refine", "benchmarks", "recipes")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".yaml")
]
PATH = re.compile(r"(?<![\w/.:~-])(?:dsd_refine|tests|benchmarks|recipes|docs|\.ci|\.github)/[\w./-]*")
STANDS_FOR_ANOTHER = re.compile(r"-$|\b(FILE|CARD|NAME|TASK)\b")  # the name goes on with a variable, or is one
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def names(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES + SOURCES, ids=names)
def test_every_path_of_the_repository_that_is_named_exists(page):
    named = {found.rstrip(".") for found in PATH.findall(page.read_text("utf-8"))}
    assert {path for path in named if not STANDS_FOR_ANOTHER.search(path) and not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=names)
def test_every_link_to_a_file_leads_to_one(page):
    assert {link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()} == set()


def test_every_test_that_stands_for_a_promise_exists():
    text = (ROOT / "docs/reliability.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and "test_" in line]
    named = {name for row in rows for name in re.findall(r"\btest_\w+\b", row)}
    tests = list((ROOT / "tests").glob("test_*.py"))
    defined = {name for path in tests for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)}
    assert len(named) > 50
    assert named - defined - {path.stem for path in tests} == set()


def test_the_index_of_the_decisions_lists_each_once_with_its_date():
    text = (ROOT / "docs/decisions.md").read_text("utf-8")
    listed = re.findall(r"^\| (\d{4}-\d\d-\d\d) \| \[(.+)\]\(#(.+)\) \|$", text, re.MULTILINE)
    written = re.findall(r"^## (.+)\n\n\*(\d{4}-\d\d-\d\d)\*$", text, re.MULTILINE)
    assert [(title, day) for day, title, _ in listed] == written
    assert len(written) == len(re.findall(r"^## ", text, re.MULTILINE))
    assert [anchor for _, _, anchor in listed] == [anchor_of(title) for title, _ in written]


def test_every_figure_among_the_results_stands_in_the_file_of_its_row():
    rows = [
        line
        for line in (ROOT / "README.md").read_text("utf-8").splitlines()
        if re.search(r"`benchmarks/results/[\w.-]+` \|$", line)
    ]
    assert len(rows) > 5
    for row in rows:
        text = (ROOT / re.findall(r"`(benchmarks/results/[\w.-]+)`", row)[-1]).read_text("utf-8")
        assert [figure for figure in re.findall(r"\b\d\.\d{4}\b", row) if figure not in text] == []


def anchor_of(title):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_citation_names_this_version():
    import dsd_refine

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == dsd_refine.__version__
    assert citation["references"][0]["year"] == 2017
