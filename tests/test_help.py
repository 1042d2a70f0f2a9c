"""What a newcomer reads: help in groups, suggestions first, recipes in groups, a plan that begins with its summary."""

import shlex

import click
import pytest
from conftest import SHORT

from dsd_refine.cli.app import cli
from dsd_refine.cli.suggest import ELSEWHERE, suggestion


def options_of(verb):
    return [parameter for parameter in cli.commands[verb].params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("verb", ["run", "plan", "verify", "push"])
def test_every_option_has_a_group_and_a_word(verb, command):
    for option in options_of(verb):
        assert option.group, option.name
        assert option.help, option.name
        assert option.help[-1] in ".…", option.name
    shown = command(verb, "--help").out
    assert all(f"{option.group}:" in shown and option.opts[0] in shown for option in options_of(verb))
    assert max(map(len, shown.splitlines())) <= 100


def test_the_help_has_three_examples_of_its_own_verbs(command):
    shown = command("--help").out
    examples = [line.strip().partition("   ")[0] for line in shown.splitlines() if line.strip().startswith("dsd-refine ")]
    assert len(examples) == 3
    verbs = set()
    for example in examples:
        _, first, *rest = shlex.split(example)
        verb, args = (first, rest) if first in cli.commands else ("run", [first, *rest])
        cli.commands[verb].make_context(verb, args)  # raises where an argument is not known or missing
        verbs.add(verb)
    assert verbs == {"run", "plan", "verify"}


def test_what_other_tools_call_otherwise_is_answered_with_the_option(refused, made):
    known = [name for option in options_of("run") for name in option.opts]
    for name, use in ELSEWHERE.items():
        assert name not in known, f"{name} is an option now"
        for word in use.split():
            assert not word.startswith("--") or word.rstrip(")") in known, use
    message = refused(made / "timm", "--learning-rate", "0.1")
    assert message == "--learning-rate: use --lr"
    assert refused(made / "timm", "--fp16") == "--fp16: use --mixed-precision fp16"
    assert refused(made / "timm", "--batch_size", "4") == "--batch_size: use --batch-size"
    assert refused(made / "timm", "--spasity", "0.3") == "--spasity: did you mean --sparsity?"
    assert "--help" in suggestion("--zzz", known)


def test_no_suggestion_names_an_option_that_the_verb_does_not_have(refused):
    assert refused("verify", "a", "b", "--fp16") == "--fp16: no such option; --help lists all"
    assert refused("verify", "a", "b", "--lr", "3") == "--lr: an option of `run` and `plan`, not of this verb"
    assert refused("resnet50", "--layers").startswith("--layers: an option of `plan`")


def test_a_long_option_with_one_dash_is_never_read_as_a_short_one_with_a_value(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("resnet50", "-output-dir=out") == "-output-dir: use --output-dir"
    assert refused("resnet50", "-lr", "0.1") == "-lr: use --lr"
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_verb_with_arguments_is_answered_with_the_verb_first(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (("plna", "resnet50", "--data", "x"), ("plna", "resnet50", "--layers")):
        assert refused(*args).startswith("did you mean `plan`?")
    assert refused("verfy", "a", "b").startswith("did you mean `verify`?")
    assert refused("train", "resnet50").startswith("did you mean `run`?")
    (tmp_path / "plans").mkdir()  # a folder of such a name is a model
    assert refused("plans", "--fp16") == "--fp16: use --mixed-precision fp16"


def test_a_task_that_is_nearly_one_is_suggested(refused, made):
    assert refused(made / "timm", "--task", "image-clasification").startswith("did you mean image-classification?")


def test_a_verb_that_is_nearly_one_is_suggested_where_no_model_has_the_name(refused, command, made, tmp_path, monkeypatch):
    assert refused("plna").startswith("did you mean `plan`?")
    assert "did you mean" not in refused("org-without-a-name-like-a-verb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plans").symlink_to(made / "timm")  # a folder of such a name is a model
    assert command("plans", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--quiet").code == 0


def test_recipes_are_listed_in_groups_and_a_slip_is_answered_first(command, refused):
    lines = command("recipes").out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "Defaults of the tasks:",
        "Models of the paper:",
        "Other models:",
        "Methods:",
    ]
    assert any(line.split()[0] == "swa" for line in lines[lines.index("Methods:") :])
    assert refused("recipes", "swa") == "did you mean `recipes show swa`?"
    assert refused("recipes", "shwo", "swa") == "did you mean `recipes show`?"
    assert refused("recipes", "show", "resnet5").startswith("did you mean 'resnet50'?")


def test_a_plan_begins_with_its_summary_and_shows_layers_when_asked(command, made):
    args = ["plan", made / "timm", "--data", made / "pictures"]
    short, long = command(*args).out, command(*args, "--layers").out
    for text in (short, long):
        lines = text.splitlines()
        assert lines[2].split()[0] == "parameters"
        assert any(line.split()[:1] == ["memory"] for line in lines[:14])
        assert any("--measure trains a few steps" in line for line in lines)
    assert "conv1.weight" not in short
    assert "conv1.weight" in long
    assert " masked (--layers shows each)" in short
