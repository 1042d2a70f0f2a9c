"""Kinds of layers beyond the plain ones: each is found, masked, and comes back; what only looks like one is left alone."""

import json

import builders
import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from dsd_refine.errors import UsageError
from dsd_refine.masking.layers import find_layers, masked_count
from dsd_refine.masking.masks import apply_masks, empty_filters, make_masks

EMPTY = torch.empty(0, dtype=torch.int64)


def layers_of(model, **options):
    return find_layers(model, **options)


def reasons(model, **options):
    return {layer.name: layer.excluded for layer in layers_of(model, **options)}


def masked(model):
    return [name for name, reason in reasons(model).items() if reason is None]


RECURRENT = {
    "LSTM, two layers, both ways, projected": nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3),
    "GRU": nn.GRU(4, 6, bidirectional=True),
    "RNN": nn.RNN(4, 6),
}
OTHERS = {
    "Conv1D": (Conv1D(6, 4), torch.randn(3, 4)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "depth-wise": (nn.Conv1d(4, 4, 3, groups=4), torch.randn(2, 4, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), torch.randn(2, 4, 3, 3)),
}


def comes_back(module, output):
    """Masked by half: exact zeros, also after a step of SGD with the mask put back; then one without, and all move."""
    parameters = dict(module.named_parameters())
    masks = make_masks(layers_of(module), parameters, 0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        output().square().sum().backward()
        gradients = {name: parameters[name].grad.clone() for name in masks}
        optimizer.step()
        return gradients

    apply_masks(masks, parameters)
    step()
    apply_masks(masks, parameters)
    for name, mask in masks.items():
        assert int((parameters[name] == 0).sum()) == masked_count(mask.numel(), 0.5), name
    gradients = step()
    for name, mask in masks.items():
        torch.testing.assert_close(parameters[name][~mask], -0.1 * gradients[name][~mask], rtol=1e-6, atol=0)
        assert bool((parameters[name][~mask] != 0).any()), name
    return set(masks)


@pytest.mark.parametrize("kind", list(RECURRENT))
def test_every_weight_of_a_recurrent_layer_is_masked_and_comes_back(kind):
    module, x = RECURRENT[kind], torch.randn(5, 2, 4)
    wanted = {name for name, _ in module.named_parameters() if name.startswith("weight_")}
    assert comes_back(module, lambda: module(x)[0]) == wanted
    assert len(wanted) == {"LSTM": 12, "GRU": 4, "RNN": 2}[type(module).__name__]


def test_cells_are_recurrent_layers_too():
    assert masked(nn.LSTMCell(3, 4)) == ["weight_ih", "weight_hh"]
    assert masked(nn.GRUCell(3, 4)) == ["weight_ih", "weight_hh"]


@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_weights_come_back(kind):
    module, x = OTHERS[kind]
    assert comes_back(module, lambda: module(x)) == {"weight"}


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}])
def test_attention_s_own_weights_come_back(sizes):
    module = nn.MultiheadAttention(4, 2, add_bias_kv=True, **sizes)
    q, k, v = torch.randn(3, 2, 4), torch.randn(3, 2, sizes.get("kdim", 4)), torch.randn(3, 2, sizes.get("vdim", 4))
    wanted = {"q_proj_weight", "k_proj_weight", "v_proj_weight"} if sizes else {"in_proj_weight"}
    assert comes_back(module, lambda: module(q, k, v)[0]) == {*wanted, "out_proj.weight"}


def test_a_network_of_lstms_is_refined(command, tmp_path):
    """timm's Sequencer: every weight of both directions is masked in the file, and trains on after."""
    sizes = {"layers": [1, 1], "embed_dims": [8, 16], "hidden_sizes": [4, 8], "mlp_ratios": [2, 2], "patch_sizes": [4, 2]}
    folder = builders.timm_checkpoint(tmp_path / "m", arch="sequencer2d_s", in_chans=3, **sizes)
    builders.image_folder(tmp_path / "data", channels=3)
    out = tmp_path / "out"
    found = command(folder, "--data", tmp_path / "data", "-o", out, *SHORT, "--save-phases", "--optimizer", "adamw")
    assert found.code == 0, found.err
    report = json.loads((out / "dsd/report.json").read_text())
    layers = {x["name"]: x for x in report["layers"] if ".rnn_" in x["name"] and ".weight_" in x["name"]}
    assert len(layers) == 2 * 2 * 4
    sparse, dense = (load_file(out / f"dsd/phases/{phase}/model.safetensors") for phase in ("1-sparse", "2-dense"))
    for name, layer in layers.items():
        assert layer["excluded"] is None
        assert int((sparse[name] == 0).sum()) == layer["masked"] == masked_count(layer["weights"], 0.5)
        assert int((dense[name] == 0).sum()) < 0.1 * layer["masked"], name


def test_a_report_warns_where_a_mask_reaches_less_than_a_third(command, made, tmp_path):
    out = tmp_path / "out"
    found = command(made / "timm", "--data", made / "pictures", "-o", out, *SHORT, "--exclude", "layer*", "--control", "none")
    assert found.code == 0, found.err
    report = json.loads((out / "dsd/report.json").read_text())
    assert report["maskable_share"] < 1 / 3
    (warning,) = (line for line in report["warnings"] if "a mask reaches only" in line)
    assert f"{report['maskable_share']:.1%}" in warning
    assert "excluded by --exclude" in warning


# ---------------------------------------------------------------- what only looks like a layer


class MoeGatedDelta(nn.Module):
    """Called like a gate of a mixture, and none."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(4, 4)


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)


class GlobalGRN(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 4, 2))


class QuantLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))


class QuantEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 4))


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.delta = MoeGatedDelta()
        self.choice = TopKRouter()
        self.grn = GlobalGRN()
        self.linear = QuantLinear()
        self.table = QuantEmbedding()
        self.rel_pos_bias = nn.Linear(8, 2, bias=False)
        self.attention_biases = nn.Parameter(torch.zeros(2, 9))
        self.distillation_token = nn.Parameter(torch.zeros(1, 2, 4))
        self.patch_pos = nn.Parameter(torch.zeros(1, 9, 4))
        self.temperature = nn.Parameter(torch.zeros(8, 1, 1))
        self.hidden_bias = nn.Parameter(torch.zeros(4, 2))


def test_kinds_by_role_and_by_name():
    found = reasons(Zoo())
    assert [name for name, reason in found.items() if reason is None] == ["delta.in_proj.weight", "linear.weight"]
    assert found["choice.layer.weight"] == "router of a mixture"
    assert found["grn.weight"] == "norm"
    assert found["table.weight"] == "embedding"
    assert found["rel_pos_bias.weight"] == found["attention_biases"] == "relative-position table"
    assert found["distillation_token"] == "class or other special token"
    assert found["patch_pos"] == "position table"
    assert found["temperature"] == "1-D parameter"
    assert found["hidden_bias"] == "bias"


def test_weight_standardised_convolutions_are_left_alone_with_their_gain_and_biases_are_just_biases():
    from timm.layers import ScaledStdConv2d

    found = reasons(nn.Sequential(ScaledStdConv2d(3, 4, 3), nn.Linear(4, 4)))
    assert found["0.weight"] == found["0.gain"] == "reparametrised weight"
    assert found["0.bias"] == "1-D parameter"
    with pytest.raises(UsageError, match="no layer to mask"):
        layers_of(ScaledStdConv2d(3, 4, 3), include=["weight"])


class FlatExperts(nn.Module):
    """DBRX keeps experts one below the other: 2-D."""

    def __init__(self):
        super().__init__()
        self.moe_num_experts = 4
        self.w1 = nn.Parameter(torch.randn(4 * 6, 5))


class ExtraExperts(nn.Module):
    """LongCat has more experts than it routes to: what counts is the tensor."""

    def __init__(self):
        super().__init__()
        self.n_routed_experts = 2
        self.gate_up_proj = nn.Parameter(torch.randn(6, 4, 5))


@pytest.mark.parametrize(("module", "experts"), [(FlatExperts(), 4), (ExtraExperts(), 6)])
def test_experts_are_counted_in_the_tensor(module, experts):
    (layer,) = layers_of(module)
    assert layer.groups == experts
    (mask,) = make_masks([layer], dict(module.named_parameters()), 0.3).values()
    size = mask.numel() // experts
    assert [(~part).sum().item() for part in mask.reshape(experts, -1)] == [masked_count(size, 0.3)] * experts


def test_kernels_that_are_mixed_are_experts():
    from timm.layers import CondConv2d

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.routing_fn = nn.Linear(4, 3)
            self.conv_pw = CondConv2d(4, 4, 3, num_experts=3)

    found = {layer.name: layer for layer in layers_of(Block())}
    assert found["routing_fn.weight"].excluded == "router of a mixture"
    assert found["conv_pw.weight"].excluded is None
    assert found["conv_pw.weight"].groups == 3


# ---------------------------------------------------------------- filters that a mask empties


def test_filters_that_a_mask_empties_are_counted():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1), nn.Linear(5, 5), nn.ConvTranspose2d(5, 5, 2))
    layers, parameters = layers_of(model), dict(model.named_parameters())
    assert empty_filters(layers, parameters) == {}
    with torch.no_grad():
        model[0].weight[1] *= 1e-3  # the smallest of all: the first to go
        model[0].weight[3] *= 1e-3
        model[2].weight[0] = 0  # a row of a matrix is no filter
        model[3].weight[2] = 0
    apply_masks(make_masks(layers, parameters, 0.5), parameters)
    assert empty_filters(layers, parameters) == {"0.weight": (2, 4), "3.weight": (1, 5)}
    model.to(memory_format=torch.channels_last)
    assert empty_filters(layers, dict(model.named_parameters()))["0.weight"] == (2, 4)
    spared = layers_of(model, exclude=["0.*", "3.*"])
    assert empty_filters(spared, parameters) == {}
