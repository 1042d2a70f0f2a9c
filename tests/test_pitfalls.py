"""The faults of public implementations of the method, one test each (what goes wrong elsewhere, what is right here)."""

import copy

import builders
import pytest
import torch
from conftest import SHORT
from torch import nn
from toys import loop_of, masks_of, mlp, run, values

from dsd_refine.masking.layers import find_layers, masked_count
from dsd_refine.masking.masks import apply_masks, check_masks, count_zeros, make_masks

EMPTY = torch.empty(0, dtype=torch.int64)


def layers_of(model):
    return find_layers(model)


def masked(model, sparsity=0.5):
    parameters = dict(model.named_parameters())
    masks = make_masks(layers_of(model), parameters, sparsity)
    apply_masks(masks, parameters)
    return masks


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_mask_then_step_moves_masked_weights(optimizer):
    """Momentum and decay of the steps before carry a weight off zero if the mask comes before the step."""
    model = mlp()
    masks = masks_of(model, 0.5)
    loop = loop_of(model, optimizer=optimizer, momentum=0.9, weight_decay=0.1)
    run(loop, masks, steps=10)
    check_masks(masks, dict(model.named_parameters()))
    run(loop, steps=1)  # the same step without the mask after it
    parameters = dict(model.named_parameters())
    assert all(torch.count_nonzero(parameters[n][~m]) for n, m in masks.items())


@pytest.mark.parametrize("value", [1.0, 0.0, -2.5])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_a_threshold_fails_at_ties(value, sparsity):
    model = nn.Linear(100, 1, bias=False)
    nn.init.constant_(model.weight, value)
    mask = make_masks(layers_of(model), dict(model.named_parameters()), sparsity)["weight"]
    assert (~mask).sum() == masked_count(100, sparsity)
    assert not mask.reshape(-1)[: masked_count(100, sparsity)].any()


@pytest.mark.parametrize("sparsity", [0.29, 0.57, 0.58, 1 / 3, 0.115])
def test_one_count_in_mask_plan_and_report(sparsity):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(50, 4))
    layers = layers_of(model)
    masks = make_masks(layers, dict(model.named_parameters()), sparsity)
    apply_masks(masks, dict(model.named_parameters()))
    zeros = count_zeros(layers, dict(model.named_parameters()))
    for layer in layers:
        if layer.excluded is None:
            assert (
                layer.masked(sparsity)
                == int((~masks[layer.name]).sum())
                == zeros[layer.name]
                == round(sparsity * layer.weights)
            )


def test_only_linear_would_skip_most_of_a_model():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {"gpt2": Conv1D(4, 3), "lstm": nn.LSTM(3, 4, bidirectional=True, proj_size=2), "attention": nn.MultiheadAttention(4, 2),
         "up": nn.ConvTranspose2d(2, 2, 3), "pair": nn.Bilinear(2, 3, 4)}
    )  # fmt: skip
    found = {layer.name for layer in layers_of(model) if layer.excluded is None}
    assert {"gpt2.weight", "attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "pair.weight"} <= found
    assert {f"lstm.weight_{kind}_l0{way}" for kind in ("ih", "hh", "hr") for way in ("", "_reverse")} <= found


def test_two_dimensions_alone_would_prune_tokens_and_tables():
    import timm

    for name in ("test_vit", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"):
            model = timm.create_model(name)
        reasons = {layer.name: layer.excluded for layer in layers_of(model)}
        tables = [n for n in reasons if "token" in n or "pos_embed" in n or "relative_position" in n]
        assert tables
        assert all(reasons[n] for n in tables)


def test_masks_live_beside_the_model():
    model = mlp()
    keys, storage = list(model.state_dict()), {n: p.data_ptr() for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    masks = masks_of(model, 0.5)
    run(loop_of(model), masks, steps=2)
    assert list(model.state_dict()) == keys
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == storage  # cuDNN's LSTMs hold on to it
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    copied = copy.deepcopy(model).state_dict()
    assert all(torch.equal(copied[n], v) for n, v in model.state_dict().items())


def test_zeros_of_the_source_and_of_chance_train_on():
    """The mask is kept, not read off the weights: what was 0 before it and is not masked moves."""
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    masks = {"2.weight": torch.ones(3, 16, dtype=torch.bool)}
    masks["2.weight"][:, 8:] = False
    apply_masks(masks, dict(model.named_parameters()))
    run(loop_of(model), masks, steps=4)
    assert torch.count_nonzero(model[2].weight[:, :4])
    assert not torch.count_nonzero(model[2].weight[:, 8:])


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_reparametrised_weights_are_left_out_and_said(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4))
    reasons = {layer.name: layer.excluded for layer in layers_of(model) if "0." in layer.name and "bias" not in layer.name}
    assert reasons
    assert all(reasons.values())
    masked(model, 0.9)
    assert torch.isfinite(model(torch.ones(1, 4))).all()


def test_multiplying_by_zero_would_keep_nan_and_minus_zero():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, float("nan"), float("inf"), 2.0]]))
    mask = {"weight": torch.tensor([[False, False, False, True]])}
    apply_masks(mask, dict(model.named_parameters()))
    assert model.weight.detach().view(torch.int32).tolist()[0][:3] == [0, 0, 0]
    assert model.weight[0, 3] == 2.0


def test_a_new_phase_has_no_momentum_left():
    """With rate 0 after a phase with momentum nothing moves: an optimizer carried over would have moved the weights."""
    model = mlp()
    loop = loop_of(model, momentum=0.9)
    run(loop, masks_of(model, 0.5), steps=4)
    before = values(model)
    run(loop, steps=3, lr=0.0)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_tied_tensors_are_masked_and_counted_once():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    layers = layers_of(model)
    assert [layer.excluded is None for layer in layers] == [True, False]
    assert "same storage" in layers[1].excluded
    masked(model, 0.25)
    assert int((model["a"].weight == 0).sum()) == 16


def test_batchnorm_of_a_single_value_is_refused_before_training(refused, made, tmp_path):
    """Torch refuses it in the middle of a step: a pooled feature of one row has no variance. Elsewhere one row is enough."""
    source = builders.timm_checkpoint(tmp_path / "levit", arch="levit_128s", in_chans=3, size=32)
    told = refused(source, "--data", made / "colours", "-o", tmp_path / "out", *SHORT, "--batch-size", "1")
    assert "(BatchNorm) sees one value a channel" in told
    assert not (tmp_path / "out.partial").exists()
