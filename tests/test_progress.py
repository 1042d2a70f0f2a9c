"""Progress: the loss, phase n of m, and the time left of the whole run."""

import pytest
from conftest import SHORT

from dsd_refine.run.progress import Display, in_words
from dsd_refine.training.hooks import Place, Step


def steps(count, before=0, all_steps=100, begin=1, phase=1, kind="sparse"):
    place = Place("refined", 1, 1, 0, phase, 2, kind, before, all_steps)
    return [Step(place, number, count, 0.1, 0.01, 0.5, 4, False) for number in range(begin, count + 1)]


@pytest.fixture
def shown(capsys):
    """Show steps that take a second each: `shown(steps)` -> what stands on stderr."""

    def show(made, terminal=False, quiet=False):
        now = [0.0]
        display = Display(quiet=quiet, clock=lambda: now[0])
        display.terminal = terminal
        with display:
            for step in made:
                now[0] += 1.0
                display.on_step(step)
            display.say("the end")
        return capsys.readouterr().err

    return show


def test_progress_says_loss_phase_and_the_time_left_of_the_whole_run(shown):
    lines = shown(steps(20, before=30)).splitlines()
    assert lines[0] == "refined, phase 1 of 2 (sparse): step 6/20, loss 0.5, 1 min left of the run"  # 64 steps at 1 s
    assert lines[-2] == "refined, phase 1 of 2 (sparse): step 20/20, loss 0.5, 50 s left of the run"


def test_after_a_resume_the_pace_is_that_of_this_process(shown):
    lines = shown(steps(900, before=0, all_steps=1000, begin=891)).splitlines()
    assert lines[-2].endswith("step 900/900, loss 0.5, 2 min left of the run")  # 100 steps at 1 s, not at 9 s / 900


def test_the_time_left_goes_on_over_the_end_of_a_phase(shown):
    lines = shown([*steps(10, all_steps=20), *steps(10, before=10, all_steps=20, phase=2, kind="dense")]).splitlines()
    assert "refined, phase 1 of 2 (sparse): step 10/10, loss 0.5, 10 s left of the run" in lines
    assert "refined, phase 2 of 2 (dense): step 10/10, loss 0.5, 0 s left of the run" in lines


def test_a_bar_says_the_time_left_of_the_run_and_not_of_the_phase(shown):
    bars = shown([*steps(10), *steps(5, before=10, phase=2, kind="dense")], terminal=True).replace("\r", "\n").splitlines()
    ends = [line for line in bars if " 10/10 " in line or " 5/5 " in line]
    assert "refined, phase 1 of 2 (sparse): 100%" in ends[0]
    assert "loss 0.5, 2 min left of the run]" in ends[0]  # 90 steps at 1 s
    assert "refined, phase 2 of 2 (dense): 100%" in ends[-1]
    assert "1 min left of the run]" in ends[-1]
    assert not any("<" in line for line in bars)  # tqdm writes the phase's own time left as elapsed<left
    assert bars[-1] == "the end"


def test_quiet_says_nothing_at_all(shown):
    assert shown(steps(20), quiet=True) == ""
    assert shown(steps(20), quiet=True, terminal=True) == ""


def test_the_command_says_so_too(command, made, tmp_path):
    said = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT).err
    assert "refined, phase 1 of 2 (sparse): step 3/3, loss " in said
    assert "dense, phase 2 of 2 (dense): step 2/2" in said


def test_lengths_of_time_in_words():
    assert [in_words(seconds) for seconds in (0.4, 59, 60, 3599, 7500)] == ["0 s", "59 s", "1 min", "1 h 00 min", "2 h 05 min"]
