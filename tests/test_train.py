"""The loop: schedules, shares, step-then-mask, loss weighting, and what evaluation leaves alone."""

import dataclasses
import importlib
import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from toys import Numbers, loop_of, masks_of, mlp, run, values

from dsd_refine.errors import RunError
from dsd_refine.masking.layers import find_layers
from dsd_refine.masking.masks import apply_masks, make_masks
from dsd_refine.recipe import Phase
from dsd_refine.seeding import stable_seed, stable_seeds
from dsd_refine.task_specs import TASKS
from dsd_refine.training.batches import epoch_order, shares
from dsd_refine.training.evaluate import evaluate, unreached
from dsd_refine.training.optimizer import learning_rate, make_optimizer
from dsd_refine.training.state import Key, micro_batches


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (20, 10)])
def test_the_rate_follows_the_stated_formula(schedule, warmup, total):
    phase = Phase(kind="dense", steps=total, lr=0.5, schedule=schedule, warmup_steps=warmup)
    for step in range(1, total + 1):
        x = (step - warmup - 1) / max(1, total - warmup)
        curve = {
            "cosine": (1 + math.cos(math.pi * x)) / 2,
            "linear": 1 - x,
            "constant": 1,
            "step": 0.1 ** math.floor(3 * x + 1e-9),
        }
        expected = 0.5 * step / warmup if step <= warmup else 0.5 * curve[schedule]
        assert learning_rate(phase, step, total) == pytest.approx(expected)


@given(units=st.integers(1, 60), size=st.integers(1, 6), world=st.integers(1, 4), batchnorm=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_row_is_taken_once_and_no_process_gets_a_lone_row_under_batchnorm(units, size, world, batchnorm):
    micro = micro_batches(units, size * world, batchnorm)
    taken = []
    for one in micro:
        parts = shares(one, size, world, batchnorm)
        assert len(parts) == world
        assert not batchnorm or units == 1 or size * world == 1 or all(len(part) != 1 for part in parts)
        taken += [row for part in parts for row in part]
    assert taken == list(range(units))


def test_order_depends_on_seed_phase_and_epoch_alone():
    orders = [epoch_order(Key(s, p), e, 50).tolist() for s, p, e in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(order) for order in orders}) == 4
    torch.manual_seed(9)
    np.random.seed(9)
    assert epoch_order(Key(0, 0), 0, 50).tolist() == orders[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_masked_weights_are_zero_after_every_step(optimizer, clip):
    model = mlp()
    masks = masks_of(model, 0.5)
    seen = []

    def look(line):
        seen.append(sum(int(torch.count_nonzero(dict(model.named_parameters())[n][~m])) for n, m in masks.items()))

    loop = loop_of(model, log=look, optimizer=optimizer, momentum=0.9, weight_decay=0.1, max_grad_norm=clip)
    run(loop, masks, steps=12)
    assert seen == [0] * 12


def test_unmasking_by_zeroed_gradients_alone_would_fail():
    """The pitfall that step-then-mask avoids: with momentum and decay, a mask before the step lets masked weights move."""
    model = mlp()
    loop = loop_of(model, momentum=0.9, weight_decay=0.1)
    run(loop, steps=2)
    masks = masks_of(model, 0.5)
    run(loop, steps=1)
    assert any(torch.count_nonzero(dict(model.named_parameters())[n][~m]) for n, m in masks.items())


def test_a_restored_weight_is_exactly_minus_rate_times_gradient():
    model = mlp()
    masks = masks_of(model, 0.5)
    loop = loop_of(model)
    run(loop, masks, steps=3)
    before = values(model)
    order = epoch_order(Key(0, 0), 0, 20)[:4]
    loss = F.cross_entropy(model(loop.task.train.x[order]), loop.task.train.y[order], reduction="sum") * (1 / 4)
    gradients = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    run(loop, steps=1, lr=0.25)
    for name, mask in masks.items():
        assert torch.equal(before[name][~mask], torch.zeros(int((~mask).sum())))
        assert torch.equal(model.state_dict()[name][~mask], -0.25 * gradients[name][~mask])


def test_masked_gradients_do_not_count_in_the_norm():
    whole, alone = mlp(), mlp()
    masks, other = masks_of(whole, 0.5), masks_of(alone, 0.5)
    run(loop_of(whole, max_grad_norm=0.01), masks, steps=1, lr=1.0)
    before = mlp().state_dict()
    apply_masks(other, before)
    moved = math.sqrt(sum(float(((whole.state_dict()[n] - before[n]) ** 2).sum()) for n in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 4), (4, 2), (1, 8), (3, 3), (3, 4)])  # the last: groups of 3, 3, 2
def test_a_step_does_not_depend_on_how_its_rows_are_split(batch, accumulate):
    whole, split = mlp(), mlp()
    size = batch * accumulate
    one, two = [], []
    first = run(loop_of(whole, batch_size=size, log=one.append), steps=6)
    second = run(loop_of(split, batch_size=batch, gradient_accumulation_steps=accumulate, log=two.append), steps=6)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, split.state_dict()[name], atol=1e-6)
    assert (first.optimizer_steps, first.samples) == (second.optimizer_steps, second.samples)
    assert [line["samples"] for line in one] == [line["samples"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)


def test_the_incomplete_last_group_is_a_step_with_its_own_weight():
    lines = []
    loop = loop_of(mlp(), Numbers(rows=10), batch_size=4, gradient_accumulation_steps=2, log=lines.append)
    assert loop.steps_per_epoch == 2
    done = run(loop, steps=None, epochs=2)
    assert [line["samples"] for line in lines] == [8, 2, 8, 2]
    assert (done.samples, done.optimizer_steps) == (20, 4)


def test_a_last_batch_of_one_row_joins_the_one_before_under_batchnorm():
    lines = []
    loop = loop_of(mlp(nn.BatchNorm1d(16)), Numbers(rows=9), batch_size=4, log=lines.append)
    run(loop, steps=None, epochs=1)
    assert [line["samples"] for line in lines] == [4, 5]


def test_one_dimensional_parameters_do_not_decay():
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    groups = make_optimizer(loop_of(model, weight_decay=0.5), Phase(kind="dense", steps=1, lr=0.1)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.5, 0.0, 0.5, 0.0]


def test_every_phase_has_a_new_optimizer():
    loop = loop_of(mlp(), momentum=0.9)
    first = make_optimizer(loop, loop.recipe.phases[0])
    assert not make_optimizer(loop, loop.recipe.phases[0]).state_dict()["state"]
    assert first is not make_optimizer(loop, loop.recipe.phases[0])
    assert not first.defaults.get("nesterov")


def test_rate_and_decay_zero_change_no_parameter_by_a_bit():
    model = mlp()
    before = values(model)
    run(loop_of(model, momentum=0.9), lr=0.0, steps=4)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_evaluation_changes_nothing_and_counts_every_row_whatever_the_batch():
    model = mlp(nn.BatchNorm1d(16), nn.Dropout(0.5))
    found = []
    for size in (1, 3, 7, 20):
        loop = loop_of(model, batch_size=size)
        model.train()
        before = values(model)
        found.append(evaluate(loop, loop.task.eval))
        assert model.training
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(one.count.sum() == 20 and np.array_equal(one.score, found[0].score) for one in found)
    assert all(np.allclose(one.loss, found[0].loss, rtol=1e-5) for one in found)


def test_dropout_is_a_function_of_seed_and_step():
    results = []
    for noise in (1, 2):
        model = mlp(nn.Dropout(0.5))
        torch.manual_seed(noise)
        run(loop_of(model), steps=5)
        results.append(values(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


class Watched(Numbers):
    """Notes the augmentation seeds that each row is asked for with, in order."""

    def __init__(self):
        super().__init__(rows=12)
        self.seeds = {}

    def batch(self, part, items):
        for unit, seed in items:
            self.seeds.setdefault(unit, []).append(seed)
        return super().batch(part, items)


def test_augmentation_differs_by_row_and_epoch_and_repeats_with_the_phase():
    tasks = [Watched(), Watched()]
    for task in tasks:
        task.draws = True
        run(loop_of(mlp(), task), steps=None, epochs=3)
    assert tasks[0].seeds == tasks[1].seeds
    assert {len(each) for each in tasks[0].seeds.values()} == {3}
    drawn = [seed for each in tasks[0].seeds.values() for seed in each]
    assert len(set(drawn)) == 12 * 3
    assert None not in drawn


def test_a_task_that_draws_nothing_is_given_no_seeds():
    task = Watched()
    run(loop_of(mlp(), task), steps=None, epochs=1)
    assert {seed for each in task.seeds.values() for seed in each} == {None}


@pytest.mark.parametrize("number", [0, 7, 10**9])
def test_seeds_made_together_are_those_made_one_by_one(number):
    assert stable_seeds((3, 1, 0), [number, 5], "augment") == [stable_seed(3, 1, 0, n, "augment") for n in (number, 5)]
    assert stable_seeds(("a",), [number], "b") == [stable_seed("a", number, "b")]


def test_evaluation_uses_the_weights_as_written_and_augments_nothing():
    """`as_written` is what knows the file's dtypes: every score is of the weights that it gives, which go back after."""
    model, task = mlp(), Watched()
    loop = loop_of(model, task)
    before, rounded = values(model), mlp()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))

    @contextmanager
    def as_written(held):
        held.load_state_dict(rounded.state_dict())
        yield
        held.load_state_dict(before)

    loop.as_written = as_written
    found, expected = evaluate(loop, task.eval), evaluate(loop_of(rounded, task), task.eval)
    assert np.array_equal(found.loss, expected.loss)
    loop.as_written = lambda held: nullcontext()
    assert not np.array_equal(found.loss, evaluate(loop, task.eval).loss)
    assert {seed for each in task.seeds.values() for seed in each} == {None}


def test_a_loss_that_is_not_finite_stops_with_its_step():
    with pytest.raises(RunError, match=r"the loss of step \d+ of 50 is (nan|inf)"):
        run(loop_of(mlp()), steps=50, lr=1e20)


def test_refresh_makes_the_mask_anew_from_the_weights_then_held():
    model = mlp()
    masks = masks_of(model, 0.5)
    first, asked = {n: m.clone() for n, m in masks.items()}, []

    def remask(number):
        asked.append(number)
        with torch.no_grad():
            model[0].weight[~first["0.weight"]] += 9  # so that others are the smallest now
        return make_masks(
            find_layers(model),
            dict(model.named_parameters()),
            0.5,
        )

    run(loop_of(model), masks, steps=7, refresh=3, remask=remask)
    assert asked == [1, 2]
    assert not torch.equal(masks["0.weight"], first["0.weight"])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_an_lstm_trains_on_after_unmasking():
    torch.manual_seed(0)
    model = Recurrent()
    masks = masks_of(model, 0.5)
    loop = loop_of(model, Numbers(shape=(5, 4)))
    run(loop, masks, steps=3)
    run(loop, steps=3)
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        assert torch.count_nonzero(dict(model.named_parameters())[name][~masks[name]]) > 0


def test_what_the_loss_does_not_reach_is_found_without_a_trace():
    model = mlp()
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    loop = loop_of(model)
    assert unreached(loop) == ["spare.weight", "spare.bias"]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("task", [*TASKS])
def test_tasks_that_augment_or_hide_say_that_they_draw(task):
    """A class whose `draws` a dataclass field of its base had replaced trained without augmentation, and nobody saw it."""
    opener = importlib.import_module(f"dsd_refine.tasks.{TASKS[task].name.replace('-', '_')}")
    (made,) = [kind for kind in vars(opener).values() if isinstance(kind, type) and getattr(kind, "name", None) == task]
    assert "draws" not in {field.name for field in dataclasses.fields(made)}
    assert made.draws is (
        task in ("image-classification", "masked-lm", "audio-classification", "ctc-speech", "image-captioning")
    )
