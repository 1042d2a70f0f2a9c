"""Phases are data: averages, teachers, frozen parameters, masks made anew; and every shipped recipe runs."""

import json

import builders
import pytest
import torch
from conftest import SHORT
from outputs import report_of
from runs import stop_after, whole
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from toys import Numbers, loop_of, mlp, run, values

from dsd_refine.errors import UsageError
from dsd_refine.masking.checkpoint_layers import frozen_names
from dsd_refine.masking.layers import find_layers
from dsd_refine.masking.masks import apply_masks, make_masks, masked_values, put_back
from dsd_refine.recipe import Distill, Phase, Recipe, read_recipe, shipped, validate
from dsd_refine.training.average import Average
from dsd_refine.training.batches import epoch_order
from dsd_refine.training.batchnorm import reestimate
from dsd_refine.training.distill import distilled
from dsd_refine.training.settings import check_settings, settings, train_mode
from dsd_refine.training.state import Key

EMPTY = torch.empty(0, dtype=torch.int64)
FAMILY = {"vit": "vit", "image-classification": "vit", "text-classification": "bert", "bert": "bert", "causal-lm": "gpt2"}
DATA = {"timm": "pictures", "bert": "texts.csv", "gpt2": "documents.txt"}
# the paper's networks and ConvNeXt as they are built, with fewer channels where their builders take that
NETWORKS = {
    "resnet18": {"channels": (16, 16, 32, 32)},
    "resnet50": {"channels": (4, 8, 8, 8), "layers": (1, 1, 1, 1)},
    "vgg16": {"mlp_ratio": 1 / 512},
    "convnext": {"arch": "convnext_atto", "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
}


def phase(kind="dense", **given):
    base = {"steps": 4, "lr": 0.1, "schedule": "constant"} | ({"sparsity": 0.5} if kind == "sparse" else {})
    return Phase.model_validate({"kind": kind, **base, **given})


def masks_at(model, sparsity=0.5, criterion="magnitude", seed=()):
    parameters = dict(model.named_parameters())
    layers = find_layers(model)
    return make_masks(layers, parameters, sparsity, criterion, seed)


# ---------------------------------------------------------------- every shipped recipe


def source_of(name, made, place):
    """A tiny model of the family that a recipe is for; any model, for a method."""
    if name == "googlenet":
        return builders.torchvision_checkpoint(place, name, init_weights=False)
    if name in NETWORKS:
        return builders.timm_checkpoint(place, **{"arch": name, "in_chans": 3, **NETWORKS[name]})
    return made / FAMILY.get(name, "timm")


# These have tests of their own: test_evidence.py, test_speech.py, test_captions.py, test_masked.py, test_tagging.py,
# test_embedding.py, test_questions.py, test_sounds.py, test_seq2seq.py, test_speech_seq2seq.py, test_picture_chats.py
ELSEWHERE = {
    "audio-classification", "captioning", "ctc-speech", "digits", "embedding", "image-captioning", "image-text-to-text", "masked-lm",
    "question-answering", "seq2seq-lm", "speech", "speech-seq2seq", "token-classification",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in shipped() if name not in ELSEWHERE])
def test_a_shipped_recipe_runs_end_to_end_with_its_steps_cut(command, made, tmp_path, name):
    raw = read_recipe(shipped()[name])
    source = source_of(name, made, tmp_path / "net")
    cut = [a for n in range(len(raw["phases"])) for a in ("--set", f"phases.{n}.epochs=0.1")]
    chosen = ["--recipe", name] if name not in raw.get("models", []) and name != "convnext" else []
    alone = ["--control", "none"] if name in ("googlenet", "vgg16") else []  # the large ones
    found = command(
        source, "--data", made / DATA.get(source.name, "colours"), "-o", tmp_path / "out", *chosen, *cut, *alone,
        "--batch-size", "8", "--gate", "none", "--device", "cpu",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert f"recipe: {name} (" in found.err  # a recipe for a network is found by the network's name
    report = report_of(tmp_path / "out")
    mine = [entry for entry in report["phases"] if entry["arm"] == "refined"]
    assert [entry["kind"] for entry in mine] == [entry["kind"] for entry in raw["phases"]]
    assert all(entry["optimizer_steps"] == 1 for entry in mine)
    assert command("verify", source, tmp_path / "out").code == 0


def test_the_recipes_of_the_paper_have_its_numbers():
    paper = {
        "googlenet": (0.3, 11, 1e-3, 22, 1e-4), "vgg16": (0.3, 1.25, 1e-4, 18, 1e-5),
        "resnet18": (0.3, 45, 1e-2, 45, 1e-3), "resnet50": (0.3, 45, 1e-2, 45, 1e-3),
    }  # fmt: skip
    for name, (sparsity, sparse, rate, dense, low) in paper.items():
        one, two = validate(read_recipe(shipped()[name])).phases
        assert (one.kind, one.sparsity, one.epochs, one.lr) == ("sparse", sparsity, sparse, rate)
        assert (two.kind, two.epochs, two.lr) == ("dense", dense, low)


def test_a_recipe_is_matched_by_model_and_task(made, command):
    found = command("plan", made / "vit", "--data", made / "colours")
    assert "recipe: vit (its models match 'vit')" in found.err
    found = command("plan", made / "timm", "--data", made / "pictures")
    assert "recipe: image-classification (the default of image-classification)" in found.err


# ---------------------------------------------------------------- masks made anew


@pytest.mark.parametrize(
    ("given", "steps"), [("once", None), ("every step", 1), ("every 1 step", 1), ("every 20 steps", 20), (7, 7)]
)
def test_refresh_in_words(given, steps):
    assert phase("sparse", refresh=given).refresh == steps


@pytest.mark.parametrize("given", ["sometimes", "every 0 steps", "every -1 steps", 0, 1.5])
def test_refresh_in_other_words_is_refused(given):
    with pytest.raises(ValueError, match="refresh"):
        phase("sparse", refresh=given)


def test_hard_thresholding_is_the_textbook_s():
    """w <- H_k(w - lr * g), g the dense gradient at the sparse w: against the formula written out."""
    model, other = mlp(), mlp()
    masks = masks_at(model)
    apply_masks(masks, dict(model.named_parameters()))
    apply_masks(masks, dict(other.named_parameters()))
    loop, steps, kept = loop_of(model), 4, masks
    order = epoch_order(Key(0, 0), 0, 20)
    for step in range(steps):
        rows = order[4 * step : 4 * step + 4]
        loss = F.cross_entropy(other(loop.task.train.x[rows]), loop.task.train.y[rows], reduction="sum") / 4
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        kept = masks_at(other) if step + 1 < steps else kept  # no new mask at the phase's end
        apply_masks(kept, dict(other.named_parameters()))
    run(loop, dict(masks), steps=steps, refresh=1, remask=lambda n: masks_at(model))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name


def by_hand(model, task, steps, momentum, rate, at_step):
    """SGD with momentum written out: `at_step(step, gradients)` masks and remasks around the plain update of `parameters`."""
    order, parameters = epoch_order(Key(0, 0), 0, 20), dict(model.named_parameters())
    speed = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(1, steps + 1):
        rows = order[4 * step - 4 : 4 * step]
        loss = F.cross_entropy(model(task.train.x[rows]), task.train.y[rows], reduction="sum") / 4
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        keep = at_step(step)
        with torch.no_grad():
            for name, parameter in parameters.items():
                seen = gradients[name] * keep["gradient"].get(name, 1)
                speed[name] = momentum * speed[name] + seen
                parameter -= rate * speed[name]
            keep["after"]()


@pytest.mark.parametrize("clip", [None, 1e9])
def test_hard_thresholding_with_momentum_is_the_textbook_s(clip):
    """Only every third step, whose end makes the mask anew, sees what is masked; between them its gradients are none."""
    model, other = mlp(), mlp()
    masks = masks_at(model)
    apply_masks(masks, dict(model.named_parameters()))
    apply_masks(masks, dict(other.named_parameters()))
    loop, kept = loop_of(model, momentum=0.9, max_grad_norm=clip), dict(masks)

    def at_step(step):
        free = step in (3,)  # not the last one, whose mask would be of no use

        def after():
            if free:
                kept.update(masks_at(other))
            apply_masks(kept, dict(other.named_parameters()))

        return {"gradient": {} if free else dict(kept), "after": after}

    by_hand(other, loop.task, 5, 0.9, 0.1, at_step)
    run(loop, masks, steps=5, refresh=3, remask=lambda n: masks_at(model))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("clip", [None, 1e9])
def test_dropconnect_with_momentum_is_the_textbook_s(clip):
    """A weight that is out in a step has no gradient there (Wan et al., equation 7), and comes back as it was."""
    model, other = mlp(), mlp()
    drawn = [masks_at(model, 0.5, "random", (n,)) for n in range(5)]
    stash = {"model": {}, "other": {}}

    def draw(which, net, number):
        parameters = dict(net.named_parameters())
        if number:
            put_back(drawn[number - 1], stash[which], parameters)
        stash[which] = masked_values(drawn[number], parameters)
        apply_masks(drawn[number], parameters)
        return dict(drawn[number])

    loop = loop_of(model, momentum=0.9, max_grad_norm=clip)
    draw("other", other, 0)

    def at_step(step):
        def after():
            apply_masks(drawn[step - 1], dict(other.named_parameters()))
            if step < 5:
                draw("other", other, step)

        return {"gradient": drawn[step - 1], "after": after}

    by_hand(other, loop.task, 5, 0.9, 0.1, at_step)
    run(loop, draw("model", model, 0), steps=5, refresh=1, criterion="random", remask=lambda n: draw("model", model, n))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("recipe", ["dropconnect", "iterative-hard-thresholding", "dsd"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_clip_that_never_clips_changes_no_byte(command, made, tmp_path, recipe, optimizer):
    short = ["--set", "phases.0.refresh=2"] if recipe.startswith("iterative") else []
    args = [made / "timm", "--data", made / "pictures", "--recipe", recipe, *SHORT, *short, "--optimizer", optimizer]
    args += ["--sparse-steps", "5", "--lr", "0.01", "--control", "random", "--quiet", "--keep", "last"]
    for out, clip in (("none", []), ("large", ["--max-grad-norm", "1e9"])):
        assert command(*args, "-o", tmp_path / out, *clip).code == 0
    names = ("model.safetensors", "dsd/predictions.parquet", "dsd/log.jsonl")
    none, large = ([(tmp_path / out / name).read_bytes() for name in names] for out in ("none", "large"))
    assert none == large


def test_what_a_random_mask_took_comes_back_as_it_was():
    model = mlp()
    before, parameters = values(model), dict(model.named_parameters())
    masks = masks_at(model, 0.3, "random", (1,))
    kept = masked_values(masks, parameters)
    apply_masks(masks, parameters)
    put_back(masks, kept, parameters)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropconnect_draws_a_new_mask_each_step(command, made, tmp_path):
    """At rate 0 every weight is the source's or 0, and after several draws far more weights are whole than one mask leaves."""
    found = command(
        made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", "--recipe", "dropconnect", "--batch-size", "8",
        "--sparse-steps", "4", "--dense-steps", "0", "--lr", "0", "--gate", "none", "--device", "cpu", "--quiet", "--save-phases",
        "--set", "weight_decay=0",
    )  # fmt: skip
    assert found.code == 0, found.err
    source, phase1 = (
        load_file(made / "timm/model.safetensors"),
        load_file(tmp_path / "out/dsd/phases/1-sparse/model.safetensors"),
    )
    for layer in report_of(tmp_path / "out")["layers"]:
        now, then = phase1[layer["name"]], source[layer["name"]]
        assert bool(((now == then) | (now == 0)).all())
        assert int((now == 0).sum()) == layer["masked"] + int((then == 0).sum())


def test_dropconnect_s_masks_are_drawn_independently_of_each_other(command, made, tmp_path):
    """A phase of N steps ends under the mask of its last step: phases of one to three steps show three masks."""
    zeros = []
    for steps in (1, 2, 3):
        out = tmp_path / str(steps)
        found = command(
            made / "timm", "--data", made / "pictures", "-o", out, "--recipe", "dropconnect", "--batch-size", "8",
            "--sparse-steps", steps, "--dense-steps", "0", "--lr", "0", "--gate", "none", "--control", "none", "--device", "cpu",
            "--quiet", "--save-phases", "--set", "weight_decay=0",
        )  # fmt: skip
        assert found.code == 0, found.err
        held = load_file(out / "dsd/phases/1-sparse/model.safetensors")
        names = [layer["name"] for layer in report_of(out)["layers"] if layer["masked"]]
        zeros.append(torch.cat([held[name].flatten() == 0 for name in names]))
    share = float(zeros[0].float().mean())
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert float((zeros[one] & zeros[other]).float().mean()) == pytest.approx(share**2, rel=0.1)


# ---------------------------------------------------------------- averages


def test_swa_is_the_mean_of_what_it_was_shown():
    model = mlp()
    average = Average(phase(average="swa"), dict(model.named_parameters()), {})
    shown = []
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1)
        shown.append(values(model))
        average.step_end()
        average.epoch_end()
    with average.held() as averaged:
        assert averaged
        for name, value in model.state_dict().items():
            assert torch.allclose(value, sum(one[name] for one in shown) / 3, atol=1e-6)
    assert all(torch.equal(value, shown[-1][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])  # of 0.5 alone old and new would weigh the same
def test_ema_follows_its_formula_and_its_state_comes_back(decay):
    model = mlp()
    given = phase(average="ema", ema_decay=decay)
    average, expected = Average(given, dict(model.named_parameters()), {}), None
    for _ in range(4):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        average.step_end()
        now = model[0].weight.detach().clone()
        expected = now if expected is None else decay * expected + (1 - decay) * now
        average = Average(given, dict(model.named_parameters()), average.pack())  # as after a stop
    assert average.settle()
    assert torch.allclose(model[0].weight, expected)


def test_the_mean_of_masked_weights_is_exactly_zero(command, made, tmp_path):
    found = command(
        made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--set", "phases.0.average=ema", "--set",
        "phases.1.average=swa", "--quiet",
    )  # fmt: skip
    assert found.code == 0, found.err
    report = report_of(tmp_path / "out")
    assert all(layer["zeros_in_sparse"] >= layer["masked"] for layer in report["layers"] if layer["masked"])
    assert {entry["batchnorm_reestimated"] for entry in report["phases"]} == {"averaged weights"}


def test_an_average_over_changing_masks_is_refused():
    with pytest.raises(ValueError, match="average"):
        phase("sparse", refresh=2, average="swa")


# ---------------------------------------------------------------- BatchNorm's statistics


def test_statistics_are_those_of_the_rows_and_nothing_else_moves():
    model = mlp(nn.BatchNorm1d(16))
    loop = loop_of(model, Numbers(rows=20), batch_size=10)
    before = values(model)
    assert reestimate(loop, Key(0, 0))
    x = loop.task.train.x[epoch_order(Key(0, 0), 0, 20)]
    hidden = [model[0](half) for half in x.split(10)]
    assert torch.allclose(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0), atol=1e-6)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"1.running_mean", "1.running_var"}
    assert model[1].momentum == 0.1
    assert not reestimate(loop_of(mlp()), Key(0, 0))


def test_a_mask_without_training_after_has_new_statistics(command, made, tmp_path):
    args = [made / "timm", "--data", made / "pictures", "--batch-size", "8", "--device", "cpu", "--gate", "none", "--quiet"]
    none = ["--set", "phases.1.average=none", "--sparse-steps", "0", "--dense-steps"]
    assert command(*args, "-o", tmp_path / "a", *none, "0").code == 0
    assert command(*args, "-o", tmp_path / "b", *none, "2").code == 0
    assert command(*args, "-o", tmp_path / "c", *none, "0", "--sparsity", "0").code == 0
    said = [
        [entry["batchnorm_reestimated"] for entry in report_of(tmp_path / out)["phases"] if entry["arm"] == "refined"]
        for out in "abc"
    ]
    assert said == [[None, "masked without training after"], [None, None], [None, None]]
    source, output = (load_file(place / "model.safetensors") for place in (made / "timm", tmp_path / "a"))
    changed = {name for name in source if not torch.equal(source[name], output[name])}
    assert any(name.endswith("running_mean") for name in changed)
    masked = {layer["name"] for layer in report_of(tmp_path / "a")["layers"] if layer["masked"]}
    assert {name for name in changed if "running" not in name} == masked


# ---------------------------------------------------------------- teachers


class Teachable(Numbers):
    def logits(self, forward, batch):
        return forward(batch.inputs["x"])

    def loss(self, forward, batch):
        return F.cross_entropy(self.logits(forward, batch), batch.targets, reduction="sum")


def test_distillation_is_its_formula():
    task, model = Teachable(), mlp()
    teacher = mlp(nn.Tanh())
    batch = task.batch(task.train, [(unit, None) for unit in range(7)])
    found = distilled(task, teacher, Distill(weight=0.3, temperature=2.0))(model, batch)
    student, taught = (F.softmax(net(batch.inputs["x"]) / 2, -1) for net in (model, teacher))
    divergence = (taught * (taught.log() - student.log())).sum()
    assert torch.allclose(found, 0.7 * task.loss(model, batch) + 0.3 * 4 * divergence, rtol=1e-5)


def test_a_model_that_is_its_own_teacher_learns_nothing_from_it():
    model = mlp()
    batch = Teachable().batch(Teachable().train, [(unit, None) for unit in range(7)])
    distilled(Teachable(), mlp(), Distill(weight=1.0))(model, batch).backward()
    assert all(parameter.grad.abs().max() < 1e-6 for parameter in model.parameters())


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_distillation_changes_a_run(command, made, tmp_path, model):
    args = [made / model, "--data", made / DATA[model], *SHORT, "--optimizer", "adamw", "--lr", "0.01", "--quiet"]
    assert command(*args, "-o", tmp_path / "plain").code == 0
    assert command(*args, "-o", tmp_path / "taught", "--set", "phases.0.distill={weight: 0.9}").code == 0
    losses = [report_of(tmp_path / out)["phases"][0]["loss_first"] for out in ("plain", "taught")]
    assert losses[1] < losses[0]  # at the first step the teacher agrees with the model but for the mask


# ---------------------------------------------------------------- frozen


def test_frozen_parameters_do_not_train_nor_count_in_the_norm():
    model = mlp(nn.BatchNorm1d(16))
    before = values(model)
    loop = loop_of(model, momentum=0.9, weight_decay=0.1, max_grad_norm=0.01)
    with settings(model, phase(frozen=["0.*", "1.*"]), {}):
        run(loop, steps=1, lr=1.0)
        assert not model[1].training  # its statistics are part of it
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"2.weight", "2.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    train_mode(model)
    assert model[1].training


def test_a_pattern_that_freezes_nothing_or_everything_is_refused():
    with pytest.raises(UsageError, match="matches no parameter"):
        frozen_names(mlp(), ["encoder.*"])
    with pytest.raises(UsageError, match="nothing to train"):
        check_settings(
            mlp(), Recipe.model_validate({"phases": [{"kind": "dense", "steps": 1, "lr": 0.1, "frozen": ["*"]}]}), {}
        )


@pytest.mark.parametrize("pattern", ["vit.encoder.layer.0.*", "vit.layers.0.*"])
def test_what_is_frozen_comes_out_byte_for_byte_and_unmasked(command, made, tmp_path, pattern):
    """ViT's tensors have one name in the file and another in the model; a glob may mean either."""
    sets = [a for n in (0, 1) for a in ("--set", f"phases.{n}.frozen=['{pattern}']")]
    found = command(made / "vit", "--data", made / "colours", "-o", tmp_path / "out", *SHORT, *sets, "--keep", "last")
    assert found.code == 0, found.err
    source, output = (load_file(place / "model.safetensors") for place in (made / "vit", tmp_path / "out"))
    moved = {name for name in source if not torch.equal(source[name], output[name])}
    held = {name for name in source if name.startswith("vit.encoder.layer.0.")}
    assert len(held) == 16
    assert moved == set(source) - held
    reasons = {layer["name"]: layer["excluded"] for layer in report_of(tmp_path / "out")["layers"]}
    assert {name for name, reason in reasons.items() if reason == "frozen in a sparse phase"} == {
        name for name in held if source[name].ndim > 1
    }


def test_a_parameter_is_frozen_whole_or_not_at_all():
    """Mixtral's file has a tensor for each expert, the model one parameter for all."""
    files = {f"experts.{n}.w1": {"0.weight"} for n in range(4)} | {"head": {"1.weight"}}
    model = mlp()[:1].append(nn.Linear(16, 2))
    assert frozen_names(model, ["head", "experts.*"], files) == {"0.weight", "1.weight"}
    assert frozen_names(model, [f"experts.{n}.*" for n in range(4)], files) == {"0.weight"}
    assert frozen_names(model, ["0.weight", "experts.1.w1"], files) == {"0.weight"}
    with pytest.raises(
        UsageError, match=r"frozen: one parameter of the model .*holds experts.1.w1 together with .*frozen whole"
    ):
        frozen_names(model, ["experts.[023].*"], files)


def test_plan_refuses_and_warns_as_a_run_does(command, refused, made, tmp_path):
    args = [made / "vit", "--data", made / "colours", "--exclude", "*layer.*", *SHORT]
    planned = command("plan", *args, "--json")
    assert planned.code == 0, planned.err
    (warning,) = json.loads(planned.out)["warnings"]
    assert warning in command("plan", *args).out
    assert command(*args, "-o", tmp_path / "out", "--quiet").code == 0
    assert warning in report_of(tmp_path / "out")["warnings"]
    assert json.loads(command("plan", made / "vit", "--json").out)["warnings"] == []
    for given in ("phases.0.frozen=['encoder.*']", "phases.1.frozen=['*']", "phases.0.frozen=['*weight']"):
        asked = (made / "vit", "--data", made / "colours", "-o", tmp_path / "no", "--set", given)
        assert refused("plan", *asked) == refused(*asked)


def test_plan_refuses_a_dropout_that_the_model_has_not(refused, tmp_path):
    builders.torchvision_checkpoint(tmp_path / "net")
    builders.image_folder(tmp_path / "data", channels=3)
    asked = (tmp_path / "net", "--data", tmp_path / "data", "-o", tmp_path / "no", "--set", "phases.0.dropout=0.1")
    assert refused("plan", *asked) == refused(*asked)
    assert "the model has no dropout to set" in refused("plan", *asked)


def test_every_kind_of_phase_goes_on_after_a_stop(command, tmp_path, made, monkeypatch):
    """An average, a stash of masked weights and a frozen part are in the saved state."""
    source = builders.timm_checkpoint(tmp_path / "timm")
    sets = [
        "phases.0.criterion=random",
        "phases.0.refresh=every step",
        "phases.1.average=ema",
        "phases.1.distill={weight: 0.3}",
    ]
    args = [source, "--data", made / "pictures", *SHORT, "--sparse-steps", "4", "--dense-steps", "4", "--quiet"]
    args += [a for one in sets for a in ("--set", one)]
    whole([*args, "-o", tmp_path / "whole"])
    for at in (2, 6):
        with monkeypatch.context() as patched:
            stop_after(patched, at)
            assert command(*args, "-o", tmp_path / f"out{at}").code == 4
        assert command(*args, "-o", tmp_path / f"out{at}", "--resume").code == 0
        for name in ("model.safetensors", "dsd/predictions.parquet"):
            assert (tmp_path / f"out{at}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---------------------------------------------------------------- pictures of the weights, empty filters


def test_the_papers_five_moments_are_kept_and_a_stop_changes_none(command, made, tmp_path, monkeypatch):
    args = [made / "timm", "--data", made / "pictures", *SHORT, "--sparsity", "0.5", "--quiet"]
    with monkeypatch.context() as patched:
        stop_after(patched, 4)
        assert command(*args, "-o", tmp_path / "out").code == 4
    state = json.loads((tmp_path / "out.partial/state.json").read_text())
    (book,) = state["run"]["histograms"].values()
    for pictures in book.values():
        moments = {picture["moment"]: picture for picture in pictures}
        assert list(moments) == ["start", "pruned", "after S", "unmasked"]
        weights = sum(moments["start"]["counts"]) + moments["start"]["zeros"]
        assert moments["pruned"]["zeros"] >= round(0.5 * weights)
        assert moments["after S"] | {"moment": ""} == moments["unmasked"] | {"moment": ""}
    assert command(*args, "-o", tmp_path / "out", "--resume").code == 0
    assert "after re-D" in (tmp_path / "out/dsd/report.html").read_text()


def test_empty_filters_are_warned_of(command, made, tmp_path):
    args = [made / "timm", "--data", made / "pictures", *SHORT, "--quiet", "--sparsity"]
    assert command(*args, "0.98", "-o", tmp_path / "a").code == 0
    assert any("held only zeros" in line for line in report_of(tmp_path / "a")["warnings"])
    assert command(*args, "0.1", "-o", tmp_path / "b").code == 0
    assert not any("held only zeros" in line for line in report_of(tmp_path / "b")["warnings"])
