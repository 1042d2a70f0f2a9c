"""Rules 1 to 3: exact counts, ties by file order, selection by role, and the mask's own exactness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsd_refine.errors import RunError, UsageError
from dsd_refine.masking.layers import TensorSlice, find_layers, masked_count
from dsd_refine.masking.masks import apply_masks, check_masks, count_zeros, make_masks
from dsd_refine.masking.selection import MAGNITUDE, threshold_by_counters

EMPTY = torch.empty(0, dtype=torch.int64)


def layers_of(model, **options):
    return find_layers(model, **options)


def reasons(model, **options):
    return {layer.name: layer.excluded for layer in layers_of(model, **options)}


def linear(values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def mask_of(model, sparsity, **options):
    return make_masks(layers_of(model), dict(model.named_parameters()), sparsity, **options)["weight"].reshape(-1)


@given(n=st.integers(1, 3000), s=st.floats(0, 0.999))
@settings(max_examples=200, deadline=None)
def test_the_count_is_round_s_n_and_never_all(n, s):
    assert masked_count(n, s) == min(round(s * n), n - 1)


@pytest.mark.parametrize(("n", "s", "count"), [(100, 0.29, 29), (1, 0.9, 0), (2, 0.99, 1), (10, 0.25, 2), (5, 0.5, 2)])
def test_counts_that_go_wrong_elsewhere(n, s, count):
    assert masked_count(n, s) == count


@given(values=st.lists(st.integers(-3, 3), min_size=2, max_size=60), s=st.floats(0, 0.99))
@settings(max_examples=100, deadline=None)
def test_exactly_the_smallest_go_and_ties_go_by_lowest_index(values, s):
    model = linear([float(v) for v in values])
    count = masked_count(len(values), s)
    if not count:
        return
    dropped = (~mask_of(model, s)).nonzero().reshape(-1).tolist()
    assert dropped == sorted(sorted(range(len(values)), key=lambda i: (abs(values[i]), i))[:count])


@given(values=st.lists(st.floats(-4, 4, width=16) | st.floats(width=32, allow_nan=False), min_size=1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_counters_give_the_magnitude_of_a_rank_and_the_equal_ones_before_it(values, data):
    """As a GPU selects."""
    count = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values)
    ranked = sorted((tensor.view(torch.int32) & MAGNITUDE).tolist())
    threshold, ties = threshold_by_counters(tensor.view(torch.int32), count)
    assert threshold == ranked[count - 1]
    assert ties == ranked[:count].count(threshold)


def test_a_source_that_is_half_zero_loses_exactly_what_was_asked():
    model = linear([0.0] * 50 + [1.0 + i for i in range(50)])
    assert int((~mask_of(model, 0.3)).sum()) == 30
    assert int((~mask_of(model, 0.7)).sum()) == 70


def test_masked_weights_are_plus_zero_and_kept_bits_are_untouched():
    model = linear([-0.5, float("nan"), -0.0, float("inf"), -2.0])
    mask = torch.tensor([[False, False, True, True, True]])
    kept = model.weight.detach().clone()
    place = model.weight.data_ptr()
    apply_masks({"weight": mask}, dict(model.named_parameters()))
    assert model.weight.data_ptr() == place
    assert torch.equal(model.weight.view(torch.int32)[0, 2:], kept.view(torch.int32)[0, 2:])
    assert model.weight.view(torch.int32)[0, :2].tolist() == [0, 0]


def test_channels_last_is_masked_in_the_file_s_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    plain = make_masks(layers_of(model), dict(model.named_parameters()), 0.4)
    model.to(memory_format=torch.channels_last)
    masks = make_masks(layers_of(model), dict(model.named_parameters()), 0.4)
    assert all(torch.equal(plain[name], masks[name]) for name in plain)
    apply_masks(masks, dict(model.named_parameters()))
    check_masks(masks, dict(model.named_parameters()))
    assert count_zeros(layers_of(model), dict(model.named_parameters()))["1.weight"] == masked_count(180, 0.4)


def test_a_masked_weight_that_moved_stops_the_run():
    model = linear([1.0, 2.0])
    with pytest.raises(RunError, match="weight: 1 masked"):
        check_masks({"weight": torch.tensor([[False, True]])}, dict(model.named_parameters()))


def test_random_masks_have_the_same_counts_and_depend_on_seed_and_name():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    parameters = dict(model.named_parameters())
    first, again, other = (make_masks(layers_of(model), parameters, 0.3, "random", (seed,)) for seed in (1, 1, 2))
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not torch.equal(first["0.weight"], first["1.weight"])
    assert {int((~mask).sum()) for mask in (*first.values(), *other.values())} == {120}


@pytest.mark.parametrize(
    ("module", "masked"),
    [
        (nn.Linear(4, 4), ["weight"]),
        (nn.Conv1d(4, 4, 3), ["weight"]),
        (nn.Conv3d(2, 2, 3), ["weight"]),
        (nn.ConvTranspose2d(4, 4, 3), ["weight"]),
        (nn.Bilinear(3, 3, 3), ["weight"]),
        (nn.LSTM(4, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRU(4, 4, bidirectional=True), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_weight_matrix_is_a_layer(module, masked):
    assert [name for name, reason in reasons(module).items() if reason is None] == masked


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.A_log = nn.Parameter(torch.zeros(4, 4))
        self.strange = nn.Parameter(torch.zeros(4, 4))
        self.norm = nn.LayerNorm((2, 4))
        self.embed = nn.Embedding(5, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_what_is_no_weight_matrix_is_listed_with_its_reason():
    found = reasons(Odd())
    assert [name for name, reason in found.items() if reason is None] == ["body.weight"]
    assert found["cls_token"] == "class or other special token"
    assert found["pos_embed"] == "position table"
    assert found["relative_position_bias_table"] == "relative-position table"
    assert found["A_log"] == "state-space parameter"
    assert found["strange"] == "parameter of no known kind"
    assert found["norm.weight"] == "norm"
    assert found["embed.weight"] == "embedding, tied to another layer"
    assert found["head.weight"] == "the same storage as embed.weight"
    assert found["normed.parametrizations.weight.original1"] == "reparametrised weight"
    assert found["spectral.parametrizations.weight.original"] == "reparametrised weight"


def test_patterns_add_and_leave_out_and_leaving_out_wins():
    assert reasons(Odd(), include=["strange"])["strange"] is None
    assert reasons(Odd(), include=["strange"], exclude=["strange"])["strange"] is not None
    assert reasons(Odd(), include=["head.*", "normed.*"])["head.weight"] == "the same storage as embed.weight"
    assert reasons(Odd(), include=["normed.*"])["normed.parametrizations.weight.original1"] == "reparametrised weight"
    with pytest.raises(UsageError, match="'nothing\\*' matches no parameter"):
        reasons(Odd(), exclude=["nothing*"])


def test_the_first_layer_and_what_the_loss_does_not_reach_stay_whole():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    found = reasons(model, first=["0"], unreached=["2.weight"])
    assert found["0.weight"] == "the first layer: it sees the input"
    assert found["1.weight"] is None
    assert found["2.weight"] == "the task's loss does not reach it"


def test_a_model_with_nothing_to_mask_is_refused():
    with pytest.raises(UsageError, match="no layer to mask"):
        layers_of(nn.LayerNorm(4))


def test_tied_layers_are_one_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    found = layers_of(model)
    masks = make_masks(found, dict(model.named_parameters(remove_duplicate=False)), 0.5)
    assert list(masks) == ["0.weight"]
    assert sum(layer.masked(0.5) for layer in found) == 8


class TinyExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 6))


class TinyMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(5, 4)
        self.experts = TinyExperts()


def test_fused_experts_are_masked_each_by_itself_and_the_router_never():
    model = TinyMoE()
    with torch.no_grad():
        model.experts.gate_up_proj[0] *= 100  # a common threshold would leave this expert whole
    found = layers_of(model)
    assert {layer.name: layer.excluded for layer in found if layer.excluded} == {
        "gate.weight": "router of a mixture",
        "gate.bias": "1-D parameter",
        "experts.gate_up_proj_bias": "bias",
    }
    mask = make_masks(found, dict(model.named_parameters()), 0.3)["experts.gate_up_proj"]
    assert [int((~expert).sum()) for expert in mask] == [masked_count(30, 0.3)] * 4


def test_parts_of_a_joined_parameter_are_masked_in_the_file_s_own_order():
    joined = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        joined.weight.copy_(torch.tensor([[9.0, 9, 9], [1, 1, 1], [9, 9, 9], [2, 2, 2]]))
    rows = torch.arange(12).reshape(4, 3)
    tensors = {
        "q": ((2, 3), [TensorSlice("weight", torch.arange(6), rows[[3, 1]].reshape(-1))]),
        "k": ((2, 3), [TensorSlice("weight", torch.arange(6), rows[[0, 2]].reshape(-1))]),
    }
    mask = make_masks(find_layers(joined, tensors), dict(joined.named_parameters()), 0.5)["weight"]
    assert mask.tolist() == [[False] * 3, [False] * 3, [True] * 3, [True] * 3]
