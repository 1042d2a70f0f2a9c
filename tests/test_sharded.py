"""A sharded run (FSDP2) does what one process with the batches of all does; what it cannot do is refused."""

import json
from types import SimpleNamespace

import builders
import pytest
import timm
from conftest import ROOT, process
from outputs import near, report_of, same
from runs import free_port
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertConfig

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Recipe
from dsd_refine.run import sharded
from dsd_refine.run.run import Options
from dsd_refine.training.shards import repeated_blocks

STEPS = ("--sparse-steps", "5", "--dense-steps", "4", "--gate", "none", "--quiet", "--device", "cpu", "--optimizer", "sgd")
TEXTS = (
    *STEPS, "--lr", "0.05", "--control", "dense", "--control", "random", "--gradient-accumulation-steps", "2",
    "--max-grad-norm", "0.5", "--set", "phases.0.refresh=2", "--set", "phases.1.average=ema", "--set", "phases.1.ema_decay=0.5",
    "--set", "phases.1.restore=source", "--set", "interpolate=[0.5]", "--save-phases",
)  # fmt: skip
PICTURES = (*STEPS, "--lr", "0.01", "--control", "none", "--set", "augment={crop: none, flip: 0.0}")


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """A folder with the outputs of sharded runs in two processes, all of one launch (see tests/support/sharded_worker.py)."""
    folder = tmp_path_factory.mktemp("sharded")
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    builders.gpt2_checkpoint(folder / "gpt2", vocab_size=41, n_embd=36, n_head=3, **still)
    texts = [folder / "gpt2", "--data", made / "documents.txt", *TEXTS]
    pictures = [made / "vit", "--data", made / "colours", *PICTURES]
    arguments = {
        "texts": [*texts, "--batch-size", 2],
        "stopped": [*texts, "--batch-size", 2],
        "pictures": [*pictures, "--batch-size", 3],
    }
    (folder / "arguments.json").write_text(json.dumps(arguments, default=str))
    support = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/support'}"
    how = ("--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", free_port())
    done = process("-m", "torch.distributed.run", *how, ROOT / "tests/support/sharded_worker.py", folder, PYTHONPATH=support)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is done") == 2
    (folder / "one").mkdir()
    return SimpleNamespace(folder=folder, texts=[*texts, "--batch-size", 4], pictures=[*pictures, "--batch-size", 6])


@pytest.mark.parametrize("name", ["texts", "pictures"])
def test_a_sharded_run_is_one_process_with_twice_the_batch(place, command, name):
    """Weights, counts, ties, the reports and the phases; a tied head, odd sizes, clipping, accumulation, refreshed masks."""
    one, two = place.folder / "one" / name, place.folder / name
    found = command(*getattr(place, name), "-o", one)
    assert found.code == 0, found.err
    near(one, two)
    reports = [report_of(out) for out in (one, two)]
    assert [report["environment"]["sharded"] for report in reports] == [False, True]
    assert [report["environment"]["processes"] for report in reports] == [1, 2]
    for field in ("layers", "masked_share", "data", "interpolated", "selected"):
        assert reports[0][field] == reports[1][field], field
    counted = ("arm", "kind", "sparsity", "measured_sparsity", "optimizer_steps", "samples", "lr_first", "lr_last")
    assert [[[phase[key] for key in counted] for phase in report["phases"]] for report in reports[:1]] == [
        [[phase[key] for key in counted] for phase in report["phases"]] for report in reports[1:]
    ]
    for arm, figures in reports[0]["arms"].items():
        assert reports[1]["arms"][arm] == pytest.approx(figures, abs=1e-5)
    assert command("verify", place.texts[0] if name == "texts" else place.pictures[0], two).code == 0


def test_the_checkpoint_at_the_end_of_the_sparse_phase_has_its_zeros(place):
    """It is written tensor by tensor from the rows of all processes."""
    weights = load_file(place.folder / "texts/dsd/phases/1-sparse/model.safetensors")
    layers = [layer for layer in report_of(place.folder / "texts")["layers"] if layer["excluded"] is None]
    assert layers
    for layer in layers:
        assert int((weights[layer["name"]] == 0).sum()) == layer["zeros_in_sparse"] == layer["masked"]


def test_a_stopped_sharded_run_goes_on_to_the_same_bytes(place):
    same(place.folder / "texts", place.folder / "stopped")


def test_a_sharded_state_is_a_file_of_each_process_and_needs_as_many(place, refused):
    left = place.folder / "left.partial"
    state = json.loads((left / "state.json").read_text())
    parts = [state["tensors"].replace(".safetensors", f".part-{n}-of-2.safetensors") for n in (1, 2)]
    assert all((left / part).is_file() and part in state["files"] for part in parts)
    message = refused(*place.texts, "-o", place.folder / "left", "--resume")
    assert "processes was 2, is 1" in message
    assert "sharded was True, is False" in message


def test_one_process_has_nothing_to_divide(made, refused, tmp_path):
    message = refused(made / "gpt2", "--data", made / "documents.txt", "-o", tmp_path / "out", *STEPS, "--shard")
    assert "torchrun --nproc-per-node" in message
    assert not (tmp_path / "out.partial").exists()


def test_accelerates_configuration_chooses_the_engine(monkeypatch):
    options = Options(output_dir=None)
    assert not sharded.is_asked(options)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"version 1.*--fsdp_version 2.*--shard"):
        sharded.is_asked(options)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharded.is_asked(options)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed.*--shard"):
        sharded.is_asked(options)


@pytest.mark.parametrize(
    ("recipe", "options", "task", "named"),
    [
        ({"soup": "greedy", "seeds": 2}, {}, "causal-lm", "soup"),
        ({"search": 4}, {}, "causal-lm", "search"),
        ({}, {"compile": True}, "causal-lm", "--compile"),
        ({}, {}, "image-captioning", "the task image-captioning"),
        ({"mixed_precision": "bf16"}, {}, "causal-lm", "--mixed-precision bf16"),
        ({"phase": {"frozen": ["*"]}}, {}, "causal-lm", "phases.0.frozen"),
        ({"phase": {"sam": 0.1}}, {}, "causal-lm", "phases.0.sam"),
        ({"phase": {"threshold": "global"}}, {}, "causal-lm", "phases.0.threshold: global"),
        ({"phase": {"criterion": "saliency"}}, {}, "causal-lm", "phases.0.criterion: saliency"),
        ({"phase": {"distill": {"weight": 0.5}}}, {}, "causal-lm", "phases.0.distill"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(recipe, options, task, named):
    recipe = dict(recipe)
    phases = [{"kind": "sparse", "steps": 1, "lr": 0.1, "sparsity": 0.3} | recipe.pop("phase", {})]
    whole = Recipe.model_validate({"phases": [*phases, {"kind": "dense", "steps": 1, "lr": 0.1}], "holdout": 0.1, **recipe})
    accelerator = SimpleNamespace(num_processes=2, mixed_precision=whole.mixed_precision or "no")
    with pytest.raises(UsageError) as error:
        sharded.refuse_early(whole, Options(output_dir=None, **options), accelerator, task)
    assert named in str(error.value)


def test_the_blocks_of_a_model_are_its_repeated_layers():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    bert = AutoModelForMaskedLM.from_config(config)
    assert repeated_blocks(bert) == list(bert.bert.encoder.layer)
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=3)
    assert repeated_blocks(vit) == list(vit.blocks)
