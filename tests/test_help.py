"""What a newcomer reads: help in groups, suggestions first, recipes in groups, a plan that begins with its summary."""

import click
import pytest
from conftest import SHORT

from dsd_refine.cli.app import cli
from dsd_refine.cli.suggest import ELSEWHERE, suggestion
from dsd_refine.run.progress import Display, in_words
from dsd_refine.training.hooks import Place, Step


def options_of(verb):
    return [parameter for parameter in cli.commands[verb].params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("verb", ["run", "plan", "verify"])
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
    examples = [line.split() for line in shown.splitlines() if line.strip().startswith("dsd-refine ")]
    assert len(examples) == 3
    assert {example[1] for example in examples} == {"resnet50", "plan", "verify"}


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


def test_a_verb_that_is_nearly_one_is_suggested_where_no_model_has_the_name(refused, command, made, tmp_path, monkeypatch):
    assert refused("plna").startswith("did you mean `plan`?")
    assert "did you mean" not in refused("org-without-a-name-like-a-verb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plans").symlink_to(made / "timm")  # a folder of such a name is a model
    assert command("plans", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--quiet").code == 0


def test_recipes_are_listed_in_groups_and_a_slip_is_answered_first(command, refused):
    lines = command("recipes").out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["Defaults of the tasks:", "Models:", "Methods:"]
    assert any(line.split()[0] == "swa" for line in lines[lines.index("Methods:") :])
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


def steps(count, before=0, all_steps=100):
    place = Place("refined", 1, 1, 0, 1, 2, "sparse", before, all_steps)
    return [Step(place, number, count, 0.1, 0.01, 0.5, 4, False) for number in range(1, count + 1)]


def test_progress_says_loss_phase_and_the_time_left_of_the_whole_run(capsys):
    now = [0.0]
    display = Display(clock=lambda: now[0])
    display.terminal = False
    for step in steps(20, before=30):
        now[0] += 1.0
        display.on_step(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "refined, phase 1 of 2 (sparse): step 6/20, loss 0.5, 1 min left of the run"  # 64 steps at 1 s
    assert lines[-1] == "refined, phase 1 of 2 (sparse): step 20/20, loss 0.5, 50 s left of the run"


def test_the_command_says_so_too(command, made, tmp_path):
    said = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT).err
    assert "refined, phase 1 of 2 (sparse): step 3/3, loss " in said
    assert "dense, phase 2 of 2 (dense): step 2/2" in said


def test_lengths_of_time_in_words():
    assert [in_words(seconds) for seconds in (0.4, 59, 60, 3599, 7500)] == ["0 s", "59 s", "1 min", "1 h 00 min", "2 h 05 min"]
