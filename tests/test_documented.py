"""What the documents tell a reader to type works: commands run, options exist, messages are those of the code."""

import ast
import re
import shutil

import click
import documents
import pytest
import yaml
from builders import bert_checkpoint, gpt2_checkpoint, image_folder, text_csv, text_file, timm_checkpoint
from chats import chat_checkpoint, chat_file
from conftest import ROOT
from documents import blocks, commands
from viewers import picture_chat, picture_chat_checkpoint

from dsd_refine.recipe import validate

ELSEWHERE = {"python.md": "test_api.py", "own-loop.md": "test_own_loop.py"}  # page -> the test that runs its Python
PLANNED = ("sparsity-and-rate.md", "several-gpus.md")  # their runs take long, so `plan` reads their options
SHELL = [block for page in documents.PAGES for block in blocks(page, "sh")]
RUN_ON = [
    page
    for page in documents.PAGES
    if any(block.kind in ("sh", "python") and not block.needs for block in blocks(page)) and page.name not in ELSEWHERE
]


def name(value):
    return value.name


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the examples name: models, data and the demo."""
    place = tmp_path_factory.mktemp("reader")
    timm_checkpoint(place / "my-model")
    image_folder(place / "imgs")
    bert_checkpoint(place / "my-checkpoint")
    text_csv(place / "train.csv", rows=24)
    text_csv(place / "test.csv", rows=12, seed=1)
    text_csv(place / "stars.csv", labels=("bad", "good"))
    gpt2_checkpoint(place / "my-language-model")
    text_file(place / "documents.txt")
    chat_checkpoint(place / "my-chat-model")
    chat_file(place / "chats.jsonl")
    picture_chat_checkpoint(place / "my-picture-model")
    picture_chat(place / "shots")
    shutil.copytree(ROOT / "recipes", place / "recipes")
    return place


@pytest.fixture
def reader(place, command, finished, digits, tmp_path, monkeypatch):
    """Run a command as a reader does who has these files, but with few steps: `reader(words, planned)` -> Result."""
    for path in (*place.iterdir(), finished):
        (tmp_path / ("finished-dsd" if path == finished else path.name)).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return lambda words, planned: command(*(["plan"] if planned else []), *shortened(words, digits))


def shortened(words, digits):
    """The arguments of a command. A run has one step in each phase, and few rows of the demo's data."""
    given = words[1:]
    if given[0] in ("plan", "verify", "recipes"):
        return given
    unit, value = ("epochs", "0.01") if "--sparse-epochs" in given else ("steps", "1")
    few = [f"--sparse-{unit}", value, f"--dense-{unit}", value, "--device", "cpu"]
    gate = [] if "--gate" in given else ["--gate", "none"]
    return [*given, *(digits[2:] if "digits" in given and "--recipe" in given else []), *few, *gate]


@pytest.mark.parametrize("page", RUN_ON, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_run_in_their_order(page, reader):
    """Commands that need a network, a GPU or the like are marked and left out; the others run, with few steps or as a plan."""
    for block in blocks(page):
        if block.kind == "python" and not block.needs:
            exec(compile(block.text, block.name, "exec"), {})
        if block.kind != "sh" or block.needs:
            continue
        for words in commands(block.text):
            if words[0] == "make":
                continue  # CI runs these
            assert words[0] == "dsd-refine", f"{block.name}: {words[0]} is not run: mark what it needs"
            done = reader(words, page.name in PLANNED)
            assert done.code in ((0, 3) if "--gate" in words else (0,)), f"{block.name}: {' '.join(words)}\n{done.err}"


def test_python_of_other_pages_is_run_by_other_tests():
    for page, test in ELSEWHERE.items():
        assert f"docs/{page}" in (ROOT / "tests" / test).read_text("utf-8")


def test_every_block_with_commands_says_what_it_is():
    """A block without a kind would be run by no test."""
    for page in documents.PAGES:
        for block in blocks(page):
            first = block.text.split(maxsplit=1)[0] if block.text.strip() else ""
            assert block.kind == "sh" or first not in documents.PROGRAMS, block.name


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_every_option_exists_and_every_target_too(block):
    targets = set(re.findall(r"^([\w./$()-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)) | {".venv/.installed"}
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    for words in commands(block.text):
        if words[0] == "make":
            assert set(words[1:]) <= targets, block.name
        if words[0] == "pip":
            asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
            assert {extra for group in asked for extra in group.split(",")} <= {*extras}, block.name
        parse(arguments_of(words))


def test_every_command_within_a_sentence_has_options_that_exist():
    for page in documents.PAGES:
        for words in documents.inline_commands(page):
            if len(words) > 2:  # a verb alone is its name
                parse([word.replace("…", "x") for word in words[1:]])


def arguments_of(words):
    """The arguments of dsd-refine in a command, also behind a launcher; None: it is another program."""
    starts = ("dsd-refine", "dsd_refine", "cli.py")
    found = next((number for number, word in enumerate(words) if word in starts), None)
    return None if found is None else words[found + 1 :]


def parse(arguments):
    """Parse the arguments of the command without running it."""
    from dsd_refine.cli.app import cli

    if arguments is None or "--help" in arguments:
        return
    context = cli.make_context("dsd-refine", list(arguments))
    verb, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    if not isinstance(command, click.Group):
        command.make_context(verb, rest, parent=context)


@pytest.mark.parametrize("block", [block for page in documents.PAGES for block in blocks(page, "yaml")], ids=name)
def test_yaml_is_a_recipe_or_steps_of_the_action(block):
    read = yaml.safe_load(block.text)
    if isinstance(read, dict):
        validate(read)
    else:
        inputs = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))["inputs"]
        assert {name for step in read for name in step["with"]} <= set(inputs)


# ---------------------------------------------------------------- messages


def texts_of_the_code():
    """Every text in the package, with … for what is filled in."""
    for path in (ROOT / "dsd_refine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_of_troubleshooting_is_one_that_the_code_says():
    quoted = re.findall(r"^### (`+) ?(.+?) ?\1$", (ROOT / "docs/troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert len(quoted) > 35
    known = [" ".join(text.split()) for text in texts_of_the_code()]
    for _, message in quoted:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        anywhere = re.compile(".*".join(map(re.escape, parts)))
        assert any(anywhere.search(text) for text in known), message
