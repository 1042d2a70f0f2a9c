"""Masks and phases in the loops of others: a plain one, timm's, Lightning's, and the Trainer of transformers."""

import csv
import re

import pytest
import torch
from builders import bert_checkpoint
from conftest import ROOT
from outputs import report_of
from runs import whole
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from dsd_refine import DSDCallback, Masker, Phase, UsageError, make_masks
from dsd_refine.training.optimizer import learning_rate

SPARSE = Phase(kind="sparse", steps=4, lr=0.02, sparsity=0.3)
DENSE = Phase(kind="dense", steps=3, lr=0.005)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A classifier without dropout, whose training depends on nothing random."""
    return bert_checkpoint(tmp_path_factory.mktemp("own") / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def examples(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(texts) as file:
        rows = list(csv.DictReader(file))
    encoded = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = [["neg", "pos"].index(row["label"]) for row in rows]
    return [{**{name: values[n] for name, values in encoded.items()}, "labels": labels[n]} for n in range(len(rows))]


def trainer(folder, texts, place, callback, *, optimizer="sgd", **arguments):
    """A Trainer that sees all rows in each step, so that their order does not matter."""
    model, rows = AutoModelForSequenceClassification.from_pretrained(folder), examples(folder, texts)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    made = torch.optim.SGD(groups, lr=1.0, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(groups, lr=1.0)
    settings = {
        "output_dir": str(place), "per_device_train_batch_size": len(rows), "max_steps": 7, "max_grad_norm": 0.0,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    training = TrainingArguments(**settings | arguments)
    return Trainer(model, training, train_dataset=rows, callbacks=[callback], optimizers=(made, None))


def ours(folder, texts, out, *more):
    args = (
        folder, "--data", texts, "--eval-data", texts, "-o", out, "--holdout", 0, "--keep", "last", "--control", "none",
        "--gate", "none", "--device", "cpu", "--quiet", "--batch-size", 24, "--sparse-steps", 4, "--dense-steps", 3,
        "--sparsity", 0.3, "--lr", 0.02, "--dense-lr", 0.005, "--weight-decay", 0.01, "--schedule", "cosine",
        "--warmup-steps", 0, "--save-phases", *more,
    )  # fmt: skip
    return whole(args)


def near(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=2e-6), name


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_trainer_reaches_the_weights_that_a_run_reaches(bert, made, tmp_path, optimizer):
    rates = ("--lr", 0.002, "--dense-lr", 0.0005) if optimizer == "adamw" else ()
    out = ours(bert, made / "texts.csv", tmp_path / "out", "--optimizer", optimizer, *rates)
    scale = 0.1 if optimizer == "adamw" else 1
    phases = [phase.model_copy(update={"lr": phase.lr * scale}) for phase in (SPARSE, DENSE)]
    run = trainer(bert, made / "texts.csv", tmp_path / "trainer", DSDCallback(phases), optimizer=optimizer)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    expected = load_file(out / "model.safetensors")
    near(run.model.state_dict(), expected)
    assert max(float((expected[name] - before[name]).abs().max()) for name in expected) > 1e-3, "it did train"
    assert report_of(out)["phases"][0]["optimizer_steps"] == 4


def zeros(model, masks):
    return {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters() if name in masks}


def masked_counts(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def test_the_mask_holds_after_each_step_and_the_rates_are_the_phases_own(bert, made, tmp_path):
    seen = []

    class Watching(DSDCallback):
        def on_optimizer_step(self, args, state, control, **given):
            super().on_optimizer_step(args, state, control, **given)
            masks = self.masker.masks if self.masker else {}
            exact = zeros(given["model"], masks) == masked_counts(masks)
            seen.append((given["optimizer"].param_groups[0]["lr"], bool(masks), exact))

    watching = Watching([SPARSE, DENSE.model_copy(update={"schedule": "constant"})])
    trainer(bert, made / "texts.csv", tmp_path, watching, lr_scheduler_type="linear").train()
    rates = [learning_rate(SPARSE, step, 4) for step in range(1, 5)] + [0.005] * 3
    assert seen == [(rate, number < 4, True) for number, rate in enumerate(rates)]


def test_a_stopped_trainer_goes_on_in_its_phase_to_the_same_weights(bert, made, tmp_path):
    whole_run = trainer(bert, made / "texts.csv", tmp_path / "whole", DSDCallback([SPARSE, DENSE]))
    whole_run.train()
    for stop in (2, 4, 5):
        place = tmp_path / f"stopped-{stop}"
        saving = {"save_strategy": "steps", "save_steps": stop}
        trainer(bert, made / "texts.csv", place, DSDCallback([SPARSE, DENSE]), **saving).train()
        again = trainer(bert, made / "texts.csv", place, DSDCallback([SPARSE, DENSE]), **saving)
        again.train(resume_from_checkpoint=str(place / f"checkpoint-{stop}"))
        near(again.model.state_dict(), whole_run.model.state_dict())


def test_phases_without_a_step_mask_all_the_same(bert, made, tmp_path):
    only = SPARSE.model_copy(update={"steps": 0})
    run = trainer(bert, made / "texts.csv", tmp_path, DSDCallback([DENSE, only]), max_steps=3)
    run.train()
    masks = make_masks(run.model, sparsity=0.3)
    assert zeros(run.model, masks) == masked_counts(masks)


@pytest.mark.parametrize(
    ("phases", "arguments", "says"),
    [
        ([SPARSE], {}, "the phases have 4 steps, the Trainer 7; set max_steps"),
        ([SPARSE, DENSE], {"max_steps": -1, "num_train_epochs": 1}, "the phases have 7 steps, the Trainer 1"),
    ],
)
def test_steps_that_do_not_add_up_are_refused(bert, made, tmp_path, phases, arguments, says):
    with pytest.raises(UsageError, match=says):
        trainer(bert, made / "texts.csv", tmp_path, DSDCallback(phases), **arguments).train()


def test_what_the_callback_cannot_do_is_refused_by_name():
    with pytest.raises(UsageError, match=r"phases\.1\.average: the callback cannot do this"):
        DSDCallback([SPARSE, DENSE.model_copy(update={"average": "swa"})])
    with pytest.raises(UsageError, match="at least one"):
        DSDCallback([])


# ---------------------------------------------------------------- any other loop


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def test_a_plain_loop_is_two_lines(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    masker = Masker(net, sparsity=0.5).attach(optimizer)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert zeros(net, masker.masks) == {"0.weight": 36, "2.weight": 18}
    masked = {name: ~mask for name, mask in masker.masks.items()}
    masker.release()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    expected = {name: -0.1 * parameter.grad[masked[name]] for name, parameter in net.named_parameters() if name in masked}
    optimizer.step()
    for name, parameter in net.named_parameters():
        if name in masked:
            assert torch.equal(parameter.detach()[masked[name]], expected[name]), "a restored weight starts at 0"


def test_a_masker_is_saved_and_loaded(net):
    masker = Masker(net, sparsity=0.5, criterion="random", seed=3)
    other = Masker(net, sparsity=0.1)
    other.load_state_dict(masker.state_dict())
    assert all(torch.equal(other.masks[name], masker.masks[name]) for name in masker.masks)
    with pytest.raises(UsageError, match="no parameter of this name"):
        other.load_state_dict({"none": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(UsageError, match="expected tensors"):
        other.load_state_dict({"0.weight": "x"})
    with pytest.raises(UsageError, match="sparsity"):
        Masker(net, sparsity=1.5)


def test_in_timm_s_loop_the_mask_holds_with_its_optimizer_and_scaler():
    """What timm's train.py does in a step: an optimizer of its factory, and the loss scaler with clipping."""
    import timm
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler

    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = create_optimizer_v2(model, opt="lamb", lr=0.01)
    masker = Masker(model, sparsity=0.3, first=["conv1.0", "stem.conv1"]).attach(optimizer)
    scaler, images = NativeScaler(device="cpu"), torch.randn(4, 3, 32, 32)
    for _ in range(2):
        loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    assert zeros(model, masker.masks) == masked_counts(masker.masks)
    assert masker.masks


def test_in_lightning_the_mask_holds(net, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, rows, number):
            return F.cross_entropy(self.net(rows[0]), rows[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
            self.masker = Masker(self.net, sparsity=0.5).attach(optimizer)
            return optimizer

    module = Module()
    rows = torch.utils.data.TensorDataset(*batch())
    fit = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    assert zeros(net, module.masker.masks) == {"0.weight": 36, "2.weight": 18}


def test_every_example_of_the_page_runs(net, bert, made, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    import timm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-loop.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 4
    given = {"torch": torch, "model": net, "batches": [batch()] * 2, "loss_of": F.cross_entropy}
    given |= {
        "rows": examples(bert, made / "texts.csv"),
        "classifier": AutoModelForSequenceClassification.from_pretrained(bert),
    }
    before = {name: value.clone() for name, value in given["classifier"].state_dict().items()}
    for number, block in enumerate(blocks):
        if number == 1:
            given["model"] = timm.create_model("test_resnet", num_classes=3)
        exec(block, given)
        if number == 1:
            assert zeros(given["model"], given["masker"].masks) == masked_counts(given["masker"].masks)
    assert not given["masker"].state_dict().keys() & {"conv1.0.weight", "conv1.weight"}
    after = given["trainer"].model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert given["Sparse"](net, F.cross_entropy).configure_optimizers()
