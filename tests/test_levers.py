"""Fields of a phase that are off by default: threshold, criterion saliency, ramp, restore, lr_scale and sam."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from outputs import report_of, same
from runs import stop_after, whole
from safetensors.torch import load_file
from torch import nn

from dsd_refine.errors import RecipeError
from dsd_refine.masking.layers import Layer
from dsd_refine.masking.masks import apply_masks, check_masks, global_counts, make_masks
from dsd_refine.recipe import Phase, validate
from dsd_refine.search import settings_of
from dsd_refine.training.sharpness import uphill

DEMO = ROOT / "recipes/demo/checkpoint"
SPARSE = {"kind": "sparse", "steps": 3, "lr": 0.05, "sparsity": 0.3}
MORE = ("--control", "dense", "--control", "random", "--keep", "last", "--holdout", "0", "--save-every", "0", "--save-phases")
DENSE = {"kind": "dense", "steps": 2, "lr": 0.01}


def arguments(out, digits, phases, *options):
    chosen = f"--set=phases={phases}".replace("'", "")
    return [DEMO, *digits, "--device", "cpu", "--gate", "none", "--quiet", "-o", out, "--batch-size", "64", chosen, *options]


# ---------------------------------------------------------------- a global threshold


def parameters_of(**sizes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) * (number + 1) for number, (name, size) in enumerate(sizes.items())}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.99])
def test_a_global_threshold_masks_the_smallest_of_the_model(sparsity):
    values = parameters_of(a=(5, 7), b=(11, 3), c=(2, 2))
    layers = [Layer.of_parameter(name, value) for name, value in values.items()]
    counts = global_counts(layers, values, sparsity)
    masks = make_masks(layers, values, sparsity, counts=counts)
    every = torch.cat([value.abs().reshape(-1) for value in values.values()])
    keep = torch.cat([masks.get(name, torch.ones_like(value, dtype=torch.bool)).reshape(-1) for name, value in values.items()])
    assert int((~keep).sum()) == min(round(sparsity * len(every)), len(every) - 3)
    assert all(mask.any() for mask in masks.values())
    if 0 < sparsity < 0.9:
        assert every[~keep].max() <= every[keep].min()


def test_ties_of_a_global_threshold_go_by_layer_then_by_index():
    values = {name: torch.ones(4) for name in ("a", "b", "c")}
    layers = [Layer.of_parameter(name, value) for name, value in values.items()]
    masks = make_masks(layers, values, 0.5, counts=global_counts(layers, values, 0.5))
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [False] * 3 + [True], "b": [False] * 3 + [True]}


def test_a_random_mask_has_the_counts_of_the_global_one():
    values = parameters_of(a=(5, 7), b=(11, 3))
    layers = [Layer.of_parameter(name, value) for name, value in values.items()]
    counts = global_counts(layers, values, 0.4)
    masks = make_masks(layers, values, 0.4, "random", (1,), counts)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {name: count for (name, _), count in counts.items()}


# ---------------------------------------------------------------- gradual sparsity


def test_sparsity_rises_to_the_whole():
    phase = Phase(**SPARSE | {"steps": 100, "refresh": "every 10 steps", "ramp": 0.5})
    at = [phase.sparsity_at(step, 100) for step in range(0, 100, 10)]
    assert at[0] == 0
    assert at == sorted(at)
    assert at[5:] == [0.3] * 5
    assert Phase(**SPARSE | {"steps": 5, "refresh": "every 10 steps", "ramp": 0.5}).sparsity_at(0, 5) == 0.3


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def outs(tmp_path_factory, digits):
    """OUT by name of the lever."""
    place = tmp_path_factory.mktemp("levers")
    more = (
        "--control",
        "dense",
        "--control",
        "random",
        "--keep",
        "last",
        "--holdout",
        "0",
        "--save-every",
        "0",
        "--save-phases",
    )
    return {name: whole(arguments(place / name, digits, phases, *more)) for name, phases in LEVERS.items()}


LEVERS = {
    "global": [
        {**SPARSE, "threshold": "global", "criterion": "saliency", "sam": 0.05},
        {**DENSE, "steps": 0, "restore": "source"},
    ],
    "gradual": [{**SPARSE, "steps": 6, "refresh": "every 2 steps", "ramp": 0.5}, {**DENSE, "lr_scale": {'"layer1*"': 1e-9}}],
}


def test_the_whole_model_has_the_sparsity_of_a_global_mask(outs):
    report = report_of(outs["global"])
    maskable = [layer for layer in report["layers"] if layer["excluded"] is None]
    total = sum(layer["weights"] for layer in maskable)
    assert sum(layer["masked"] for layer in maskable) == round(0.3 * total)
    assert all(layer["zeros_in_sparse"] >= layer["masked"] for layer in maskable)
    assert len({round(layer["masked"] / layer["weights"], 2) for layer in maskable}) > 1
    zeros = {phase["arm"]: phase["measured_sparsity"] for phase in report["phases"] if phase["kind"] == "sparse"}
    assert zeros["refined"] == zeros["random"]


def test_masked_weights_come_back_with_the_sources_values(outs):
    source = load_file(DEMO / "model.safetensors")
    sparse, dense = (load_file(outs["global"] / f"dsd/phases/{name}/model.safetensors") for name in ("1-sparse", "2-dense"))
    layers = [layer["name"] for layer in report_of(outs["global"])["layers"] if layer["masked"]]
    for name in layers:
        masked = sparse[name] == 0
        assert torch.equal(dense[name][masked], source[name][masked])
        assert torch.equal(dense[name][~masked], sparse[name][~masked])


def test_a_gradual_mask_ends_with_the_whole_sparsity(outs):
    for layer in report_of(outs["gradual"])["layers"]:
        if layer["excluded"] is None:
            assert layer["zeros_in_sparse"] == layer["masked"] == round(0.3 * layer["weights"])


def test_a_scaled_rate_hardly_moves_its_parameters(outs):
    sparse, dense = (load_file(outs["gradual"] / f"dsd/phases/{name}/model.safetensors") for name in ("1-sparse", "2-dense"))
    moved = {name: float((dense[name] - sparse[name]).abs().max()) for name in sparse if "conv" in name}
    scaled = [value for name, value in moved.items() if name.startswith("layer1")]
    assert scaled
    assert max(scaled) < 1e-8 < max(moved.values())


def test_a_stopped_run_ends_in_the_same_bytes(outs, command, digits, tmp_path, monkeypatch):
    args = arguments(tmp_path / "out", digits, LEVERS["global"], *MORE)
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert command(*args).code == 4
    assert command(*args, "--resume").code == 0
    same(outs["global"], tmp_path / "out")


# ---------------------------------------------------------------- sharpness-aware steps


def test_weights_are_moved_uphill_and_return_exactly():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    parameters = dict(model.named_parameters())
    masks = make_masks([Layer.of_parameter("0.weight", parameters["0.weight"])], parameters, 0.5)
    apply_masks(masks, parameters)
    model(torch.randn(8, 4)).square().mean().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with uphill(SimpleNamespace(model=model, parameters=parameters), masks, 0.1):
        moves = [(parameters[name].detach() - before[name]).reshape(-1) for name in parameters]
        assert float(torch.cat(moves).norm()) == pytest.approx(0.1, rel=1e-4)
        check_masks(masks, parameters)
        model(torch.randn(8, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({**DENSE, "threshold": "global"}, "leave out ramp and threshold"),
        ({**SPARSE, "restore": "source"}, "restore belongs to the dense phase"),
        ({**SPARSE, "ramp": 0.5}, "give refresh"),
        ({**SPARSE, "criterion": "saliency", "refresh": "every step"}, "saliency has one mask a phase"),
        ({**DENSE, "sam": 0}, "sam"),
        ({**DENSE, "lr_scale": {"fc*": -1}}, "lr_scale"),
    ],
)
def test_fields_that_do_not_fit_are_refused(phase, says):
    with pytest.raises(RecipeError, match=says):
        validate({"phases": [phase]})


def test_a_glob_that_matches_nothing_is_refused(refused, digits, tmp_path):
    message = refused(*arguments(tmp_path / "out", digits, [{**DENSE, "lr_scale": {'"fx*"': 0.1}}]))
    assert "phases.0.lr_scale: 'fx*' matches no parameter" in message


def test_levers_can_be_searched():
    space = {"phases.0.threshold": ["layer", "global"], "phases.1.sam": [None, 0.05], "phases.1.lr_scale": [{}, {"*": 0.5}]}
    recipe = validate({"phases": [SPARSE, DENSE], "search": {"tries": 6, "space": space}})
    assert len(settings_of(recipe)) == 6


def test_a_plain_recipe_is_written_without_them():
    text = validate({"phases": [SPARSE, DENSE]}).dump()
    assert not [name for name in ("threshold", "ramp", "restore", "lr_scale", "sam", "soup") if name in text]
