"""`interpolate`: weights between the source's and an arm's, if the holdout prefers them."""

import pytest
import torch
from conftest import ROOT
from outputs import report_of, same
from runs import stop_after, whole
from safetensors.torch import load_file

from dsd_refine.training.average import between

DEMO = ROOT / "recipes/demo/checkpoint"
# The rate is too high, so that weights nearer to the source are better.
STEEP = (
    "--sparse-steps",
    "3",
    "--dense-steps",
    "3",
    "--lr",
    "0.3",
    "--dense-lr",
    "0.1",
    "--batch-size",
    "64",
    "--save-every",
    "0",
)
SHARES = "--set=interpolate=[0.1, 0.3]"


def arguments(out, digits, *options):
    return [DEMO, *digits, "--device", "cpu", "--gate", "none", "--quiet", "-o", out, *STEEP, *options]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, digits):
    place = tmp_path_factory.mktemp("interpolated")
    return [whole(arguments(place / str(number), digits, *more)) for number, more in enumerate(((), (SHARES,)))]


def test_the_holdout_chooses_and_each_arm_is_offered_it(outputs):
    plain, mixed = map(report_of, outputs)
    assert plain["interpolated"] is None
    for arm, share in mixed["interpolated"].items():
        assert share in (0.1, 0.3, 1.0)
        better, own = mixed["holdout"][arm], plain["holdout"][arm]
        assert (better == own) == (share == 1.0)
        assert (better["accuracy"], -better["loss"]) >= (own["accuracy"], -own["loss"])
    assert mixed["interpolated"]["refined"] < 1
    assert f"{100 * mixed['interpolated']['refined']:.3g} % of the way from the source" in mixed["published_name"]


def test_published_parameters_lie_between(outputs):
    share = report_of(outputs[1])["interpolated"]["refined"]
    source, trained, mixed = (load_file(folder / "model.safetensors") for folder in (DEMO, *outputs))
    for name, value in mixed.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, torch.lerp(source[name], trained[name], share))
    assert any(not torch.equal(mixed[name], source[name]) for name in mixed if "running_mean" in name)


def test_equal_values_stay_and_integers_are_the_trained_ones():
    source = {"w": torch.tensor([0.1, 0.3]), "n": torch.tensor(3)}
    mixed = between(source, {"w": torch.tensor([0.1, 0.7]), "n": torch.tensor(5)}, 0.5)
    assert mixed["w"][0] == source["w"][0]
    assert mixed["w"][1] == pytest.approx(0.5)
    assert mixed["n"] == 5


@pytest.mark.parametrize("after", [5, 8])
def test_it_is_resumed_to_the_same_bytes(outputs, command, digits, tmp_path, monkeypatch, after):
    with monkeypatch.context() as patched:
        stop_after(patched, after)
        assert command(*arguments(tmp_path / "out", digits, SHARES)).code == 4
    assert command(*arguments(tmp_path / "out", digits, SHARES), "--resume").code == 0
    same(outputs[1], tmp_path / "out")


@pytest.mark.parametrize(
    "options", [["--set=interpolate=[0]"], ["--set=interpolate=[1.5]"], [SHARES, "--holdout", "0", "--keep", "last"]]
)
def test_what_cannot_be_is_refused(refused, digits, tmp_path, options):
    assert "interpolate" in refused(*arguments(tmp_path / "out", digits, *options))
