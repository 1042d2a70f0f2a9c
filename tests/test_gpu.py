"""What only a GPU can show. Without one these tests are skipped; `benchmarks/gpu.sh` runs them before it measures."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from builders import gpt2_checkpoint, save_transformers, word_tokenizer
from outputs import near, report_of, same
from runs import torchrun
from safetensors.torch import load_file
from torch import nn
from toys import Numbers, loop_of, masks_of, run

from dsd_refine.checkpoint.checkpoint import open_checkpoint
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.masking.selection import all_but_smallest
from dsd_refine.training.optimizer import let_go_of_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

STEPS = ("--sparse-steps", "4", "--dense-steps", "2", "--gate", "none", "--batch-size", "8", "--device", "cuda", "--quiet")


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate sets the device and the precision once for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def on_gpu(model, **recipe):
    accelerator = Accelerator(**({"mixed_precision": recipe.pop("mixed")} if "mixed" in recipe else {}))
    return loop_of(model.to(accelerator.device), Numbers(rows=64), accelerator=accelerator, **recipe)


@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw"}, {"mixed": "bf16"}, {"max_grad_norm": 1.0}, {"ema": True}])
def test_no_step_waits_for_the_device(more):
    """Apart from the steps' losses, which are fetched some steps late through an event."""
    average = {"average": "ema", "ema_decay": 0.9} if more.get("ema") else {}
    loop = on_gpu(
        nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 3)), **{k: v for k, v in more.items() if k != "ema"}
    )
    masks = masks_of(loop.model, 0.5)
    run(loop, masks, **average)  # what is made once may wait
    loop.autocast = watched(loop.autocast)
    try:
        assert run(loop, masks, **average).step == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watched(autocast):
    """From the first step on, an operation that waits for the device is an error. The mask was made before."""

    def begin():
        torch.cuda.set_sync_debug_mode("error")
        return autocast()

    return begin


@pytest.mark.parametrize("shape", [(1000, 999), (64, 32, 3, 3)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_same_weights_are_selected_as_on_a_cpu(shape, ties):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = values.mul(8).round() if ties else values
    values = values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values
    for share in (0.001, 0.3, 0.9):
        count = int(share * values.numel())
        found = all_but_smallest(values.cuda(), count)
        assert found.stride() == values.stride()
        assert torch.equal(found.cpu(), all_but_smallest(values, count))
        assert int((~found).sum()) == count


def test_every_arm_skips_its_own_steps_for_the_loss_scale(command, made, tmp_path):
    """The scale of fp16 begins anew with each phase: no arm pays for another."""
    args = ("--mixed-precision", "fp16", "--control", "dense", "--control", "random", "--sparse-steps", "12")
    found = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *STEPS, *args)
    assert found.code == 0, found.err
    phases = report_of(tmp_path / "out")["phases"]
    steps = {arm: [each["optimizer_steps"] for each in phases if each["arm"] == arm] for arm in ("refined", "dense", "random")}
    assert steps["refined"] == steps["dense"] == steps["random"]


def test_an_evaluation_needs_no_memory_beyond_the_gradients(tmp_path):
    """The weights that are rounded take the place of the gradients."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
    model = BertForSequenceClassification(BertConfig(**shape)).to(torch.bfloat16)
    folder = save_transformers(model, tmp_path / "bert", word_tokenizer())
    source = find_source(str(folder))
    checkpoint = open_checkpoint(source, open_library(source, None))
    weights = checkpoint.model.cuda()
    for parameter in weights.parameters():
        parameter.grad = torch.zeros_like(parameter)
    size = sum(p.numel() * p.element_size() for p in weights.parameters())
    training = torch.cuda.memory_allocated()
    let_go_of_gradients(torch.optim.SGD(weights.parameters(), lr=0.1))
    torch.cuda.reset_peak_memory_stats()
    with checkpoint.rounded(weights):
        most = torch.cuda.max_memory_allocated()
    assert size > 20 << 20
    assert most <= training + 0.15 * size  # one tensor at a time is held twice


def test_a_larger_batch_of_evaluation_changes_no_prediction(command, made, tmp_path):
    """A GPU chooses it by the memory that one batch takes."""
    for name, more in (("chosen", ()), ("given", ("--eval-batch-size", "8"))):
        args = (*STEPS, "--control", "none", "--seed", "3", *more)
        found = command(made / "bert", "--data", made / "texts.csv", "-o", tmp_path / name, *args)
        assert found.code == 0, found.err
    one, other = (report_of(tmp_path / name)["arms"]["refined"] for name in ("chosen", "given"))
    assert one["accuracy"] == other["accuracy"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_masked_weight_is_exactly_0_and_returns(command, made, tmp_path, precision):
    args = (*STEPS, "--control", "none", "--keep", "last", "--mixed-precision", precision, "--dense-steps", "8")
    found = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *args)
    assert found.code == 0, found.err
    layers = [layer for layer in report_of(tmp_path / "out")["layers"] if layer["excluded"] is None]
    assert all(layer["zeros_in_sparse"] == layer["masked"] > 0 for layer in layers)
    weights = load_file(tmp_path / "out/model.safetensors")
    left = sum(int((weights[layer["name"]] == 0).sum()) for layer in layers)  # of channels that no gradient reaches
    assert left < 0.6 * sum(layer["masked"] for layer in layers)


def test_a_compiled_run_has_the_masks_of_a_plain_one(command, made, tmp_path):
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        args = (*STEPS, "--control", "none", "--save-phases", *more)
        found = command(made / "bert", "--data", made / "texts.csv", "-o", tmp_path / name, *args)
        assert found.code == 0, found.err
    zeros = []
    for name in ("plain", "compiled"):
        held = load_file(next((tmp_path / name / "dsd/phases").glob("1-*")) / "model.safetensors")
        zeros.append({key: value == 0 for key, value in held.items() if "weight" in key and value.ndim == 2})
    assert all(torch.equal(zeros[0][key], zeros[1][key]) for key in zeros[0])


def test_the_log_has_every_step_in_order(command, made, tmp_path):
    """Losses arrive some steps late; none is lost at the end of a phase."""
    found = command(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *STEPS, "--control", "none")
    assert found.code == 0, found.err
    lines = [json.loads(line) for line in (tmp_path / "out/dsd/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line and "loss" in line] == [1, 2, 3, 4, 1, 2]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA devices here")
SGD = ("--sparse-steps", "4", "--dense-steps", "2", "--gate", "none", "--device", "cuda", "--optimizer", "sgd", "--lr", "0.05")


@two_gpus
@pytest.mark.parametrize("more", [(), ("--cpu-offload",), ("--activation-checkpointing",)])
def test_a_model_divided_among_two_gpus_is_one_with_the_batches_of_both(command, made, tmp_path, more):
    source = gpt2_checkpoint(tmp_path / "source", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    args = (source, "--data", made / "documents.txt", *SGD, "--control", "none", "--save-phases")
    assert command(*args, "--batch-size", 8, "-o", tmp_path / "one").code == 0
    done = torchrun(*args, "--batch-size", 4, "--shard", *more, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    near(tmp_path / "one", tmp_path / "two", 1e-4)
    assert report_of(tmp_path / "one")["layers"] == report_of(tmp_path / "two")["layers"]


@two_gpus
def test_tries_side_by_side_on_two_gpus_have_the_bytes_of_one(command, made, tmp_path):
    args = (made / "gpt2", "--data", made / "documents.txt", *SGD, "--control", "dense", "--seeds", 2, "--batch-size", 8)
    assert command(*args, "-o", tmp_path / "one").code == 0
    done = torchrun(*args, "--spread", "tries", "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "one", tmp_path / "two")
