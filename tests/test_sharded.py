"""A sharded run (FSDP2) does what one process with the batches of all does; what it cannot do is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
import timm
import torch
from conftest import ROOT, process
from outputs import near, report_of, same
from runs import free_port, in_group, run_command, run_on_full_disk
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dsd_refine.checkpoint.checkpoint import open_checkpoint, open_unread
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.placement import TensorSlice
from dsd_refine.checkpoint.source import find_source
from dsd_refine.checkpoint.verify import check_plain_values
from dsd_refine.errors import UsageError
from dsd_refine.masking.layers import Layer
from dsd_refine.recipe import Recipe
from dsd_refine.run import rates, sharded
from dsd_refine.run.open import checkpoint_activations
from dsd_refine.run.run import Options
from dsd_refine.training.blocks import divided_parts, repeated_blocks

STEPS = ("--sparse-steps", "5", "--dense-steps", "4", "--gate", "none", "--quiet", "--device", "cpu", "--optimizer", "sgd")
TEXTS = (
    *STEPS, "--lr", "0.05", "--control", "dense", "--control", "random", "--gradient-accumulation-steps", "2",
    "--max-grad-norm", "0.5", "--set", "phases.0.refresh=2", "--set", "phases.1.average=ema", "--set", "phases.1.ema_decay=0.5",
    "--set", "phases.1.restore=source", "--set", "interpolate=[0.5]", "--save-phases",
)  # fmt: skip
LLAMA = (
    *STEPS, "--lr", "0.05", "--control", "none", "--include", "lm_head.weight", "--max-grad-norm", "0.5",
    "--set", "phases.0.frozen=[model.embed_tokens.*, model.layers.1.*]",
)  # fmt: skip
MIXTRAL = (*STEPS, "--lr", "auto", "--control", "none", "--max-grad-norm", "0.5", "--search", "2", "--save-phases")
FUSED = (*STEPS, "--lr", "0.05", "--control", "random", "--max-grad-norm", "0.5", "--save-phases")
PICTURES = (
    *STEPS, "--lr", "0.01", "--control", "none", "--set", "augment={crop: none, flip: 0.0}", "--seeds", "2", "--set", "soup=uniform",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """A folder with the outputs of sharded runs in two processes, all of one launch (see tests/support/sharded_worker.py)."""
    folder = tmp_path_factory.mktemp("sharded")
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    builders.gpt2_checkpoint(folder / "gpt2", vocab_size=41, n_embd=36, n_head=3, **still)
    llama_checkpoint(folder / "llama-source")
    mixtral_checkpoint(folder / "mixtral-source")
    fused_checkpoint(folder / "fused-source")
    texts = [folder / "gpt2", "--data", made / "documents.txt", *TEXTS]
    pictures = [made / "vit", "--data", made / "colours", *PICTURES]
    llama = [folder / "llama-source", "--data", made / "documents.txt", *LLAMA]
    mixtral = [folder / "mixtral-source", "--data", made / "documents.txt", *MIXTRAL]
    fused = [folder / "fused-source", "--data", made / "documents.txt", *FUSED]
    arguments = {
        "texts": [*texts, "--batch-size", 2],
        "stopped": [*texts, "--batch-size", 2],
        "killed": [*texts, "--batch-size", 2],
        "pictures": [*pictures, "--batch-size", 3],
        "llama": [*llama, "--batch-size", 2, "--activation-checkpointing", "--cpu-offload"],
        "mixtral": [*mixtral, "--batch-size", 2],
        "fused": [*fused, "--batch-size", 2],
        "half": [*llama, "--batch-size", 2, "--mixed-precision", "bf16"],
    }
    (folder / "arguments.json").write_text(json.dumps(arguments, default=str))
    died = launch(folder, "die")
    assert died.returncode != 0
    assert "exitcode: -9" in died.stderr
    assert "another process of this run has ended; see its message, then go on with --resume" in died.stderr
    assert not (folder / "killed").exists()
    assert (folder / "killed.partial/state.json").is_file()
    done = launch(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is done") == 2
    for said in ("Error: stopped at step", "part-2-of-2.safetensors: cannot write"):
        assert done.stderr.count(said) == 1, done.stderr  # the main process alone says it
    (folder / "one").mkdir()
    one = {
        "texts": [*texts, "--batch-size", 4],
        "pictures": [*pictures, "--batch-size", 6],
        "llama": [*llama, "--batch-size", 4],
        "mixtral": [*mixtral, "--batch-size", 4],
        "fused": [*fused, "--batch-size", 4],
    }
    return SimpleNamespace(folder=folder, **one)


def launch(*args):
    """Start tests/support/sharded_worker.py in two processes."""
    support = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/support'}"
    how = ("--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", free_port())
    worker = ROOT / "tests/support/sharded_worker.py"
    return process("-m", "torch.distributed.run", *how, worker, *args, PYTHONPATH=support)


def llama_checkpoint(folder):
    """A Llama with sizes that no number of processes divides, in bfloat16, in two files, with a head of its own."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=41, hidden_size=36, intermediate_size=101, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=12, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(0.5)[::2] *= -1  # nothing but ties
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    builders.word_tokenizer().save_pretrained(folder)


def mixtral_checkpoint(folder, blocks=2):
    """A mixture of three experts, which no number of processes divides; the model fuses them, the file does not."""
    torch.manual_seed(2)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=41, hidden_size=32, intermediate_size=20, num_hidden_layers=blocks, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    builders.word_tokenizer().save_pretrained(folder)


def fused_checkpoint(folder):
    """A mixture of three experts, each kind of whose weights the file and the model hold in one tensor."""
    torch.manual_seed(3)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=41, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    builders.word_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("name", ["texts", "pictures", "llama", "mixtral", "fused"])
def test_a_sharded_run_is_one_process_with_twice_the_batch(place, command, monkeypatch, name):
    """Weights, counts, ties, the reports and the phases; a tied head, odd sizes, clipping, accumulation, refreshed masks,
    frozen parameters.

    Also a soup, a search, a tested rate, and experts that the model fuses, and the file too or not.
    """
    monkeypatch.setattr(rates, "STEPS", 8)
    monkeypatch.setattr(rates, "SHORTEST_RUN", 1)
    one, two = place.folder / "one" / name, place.folder / name
    found = command(*getattr(place, name), "-o", one)
    assert found.code == 0, found.err
    near(one, two, 0.004 if name == "llama" else 1e-5)  # a step of bfloat16
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
    assert command("verify", getattr(place, name)[0], two).code == 0


def test_four_processes_make_the_masks_of_one(place, command):
    """A tied head, and sizes that four does not divide."""
    args = [place.texts[0], *place.texts[1:3], *STEPS, "--lr", "0.05", "--control", "none", "--save-phases"]
    one, four = place.folder / "one-of-four", place.folder / "four"
    assert command(*args, "-o", one, "--batch-size", 4).code == 0
    done = in_group(4, run_command, *args, "-o", four, "--batch-size", 1, "--shard")
    assert done.returncode == 0, done.stderr
    near(one, four)
    sparse = [load_file(out / "dsd/phases/1-sparse/model.safetensors") for out in (one, four)]
    assert all(torch.equal(weight == 0, sparse[1][name] == 0) for name, weight in sparse[0].items())
    assert report_of(one)["layers"] == report_of(four)["layers"]


def test_experts_that_a_parameter_fuses_are_masked_each_by_itself(place):
    weights = load_file(place.folder / "mixtral/dsd/phases/1-sparse/model.safetensors")
    layers = [layer for layer in report_of(place.folder / "mixtral")["layers"] if "experts" in layer["name"]]
    assert len(layers) == 2 * 3 * 3
    for layer in layers:
        assert int((weights[layer["name"]] == 0).sum()) == layer["zeros_in_sparse"] == layer["masked"] > 0


def test_experts_that_the_file_fuses_are_masked_each_by_itself(place):
    weights = load_file(place.folder / "fused/dsd/phases/1-sparse/model.safetensors")
    layers = [layer for layer in report_of(place.folder / "fused")["layers"] if layer["masked"] and "experts" in layer["name"]]
    assert len(layers) == 2 * 2
    for layer in layers:
        zeros = [int((expert == 0).sum()) for expert in weights[layer["name"]]]
        assert zeros == [round(0.3 * weights[layer["name"]][0].numel())] * 3


@pytest.mark.parametrize("name", ["gpt2", "vit", "llama-source", "mixtral-source", "fused-source"])
def test_a_model_to_divide_is_opened_without_its_values(place, made, name):
    """Its parameters have no memory; the files' tensors are where the usual opening finds them."""
    source = find_source(str(made / "vit" if name == "vit" else place.folder / name))
    library = open_library(source, None, False)
    unread, usual = open_unread(source, library), open_checkpoint(source, library)
    assert all(parameter.is_meta for parameter in unread.model.parameters())
    assert [*unread.placement] == [*usual.placement]
    state = usual.model.state_dict()
    for key, value in unread.values.items():
        assert torch.equal(value.float(), state[key].float())
    for key, buffer in unread.model.named_buffers():
        assert torch.equal(buffer, usual.model.get_buffer(key))
    check_plain_values(unread)
    ties = [len({id(p) for _, p in model.named_parameters(remove_duplicate=False)}) for model in (unread.model, usual.model)]
    assert ties[0] == ties[1]


def test_a_model_of_many_blocks_is_traced_too(tmp_path):
    """The library loads it once for each block."""
    mixtral_checkpoint(tmp_path / "deep", blocks=9)
    source = find_source(str(tmp_path / "deep"))
    unread = open_unread(source, open_library(source, None, False))
    assert unread is not None
    assert len(unread.moved) == 9 * (3 * 3 + 1)


def test_a_pickle_to_divide_is_mapped(place, tmp_path):
    """Reading it takes no memory, and no process holds more than its rows."""
    shutil.copytree(place.folder / "gpt2", tmp_path / "pickled")
    tensors = load_file(tmp_path / "pickled/model.safetensors")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pickled/pytorch_model.bin")
    source = find_source(str(tmp_path / "pickled"), allow_pickle=True)
    unread = open_unread(source, open_library(source, None, False), allow_pickle=True)
    assert unread.layout.from_pickle
    assert all(parameter.is_meta for parameter in unread.model.parameters())
    for name, slices in unread.placement.items():
        assert torch.equal(unread.values[slices[0].key], tensors[name])
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(tmp_path / "pickled/pytorch_model.bin") in maps.read_text()


def test_a_sharded_run_computes_in_bf16(place, command):
    """The outputs of the proof are bf16 too; the weights are near those of float32."""
    assert report_of(place.folder / "half")["environment"]["sharded"]
    assert command("verify", place.llama[0], place.folder / "half").code == 0
    outputs = load_file(place.folder / "half/dsd/probe.safetensors")
    assert {value.dtype for name, value in outputs.items() if name.endswith("output")} == {torch.bfloat16}
    near(place.folder / "llama", place.folder / "half", 0.05)


def test_the_checkpoint_at_the_end_of_the_sparse_phase_has_its_zeros(place):
    """It is written tensor by tensor from the rows of all processes."""
    weights = load_file(place.folder / "texts/dsd/phases/1-sparse/model.safetensors")
    layers = [layer for layer in report_of(place.folder / "texts")["layers"] if layer["excluded"] is None]
    assert layers
    for layer in layers:
        assert int((weights[layer["name"]] == 0).sum()) == layer["zeros_in_sparse"] == layer["masked"]


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_an_ended_sharded_run_goes_on_to_the_same_bytes(place, name):
    """After a full disk and a signal of one process alone, and after a kill of one: all end, and nothing is published."""
    same(place.folder / "texts", place.folder / name)


def test_a_full_disk_of_the_main_process_at_the_end_publishes_nothing(place, tmp_path):
    """The other process ends by itself. What was trained is there."""
    out, args = tmp_path / "out", [*place.llama[:3], *STEPS, "--lr", "0.05", "--control", "none", "--batch-size", 2, "--shard"]
    done = in_group(2, run_on_full_disk, *args, "-o", out)
    assert done.returncode == 5
    assert done.stderr.count("No space left on device") == 1
    assert "another process of this run has ended; see its message, then go on with --resume" in done.stderr
    assert not out.exists()
    again = in_group(2, run_command, *args, "-o", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert (out / "dsd/report.json").is_file()


def test_a_sharded_state_is_a_file_of_each_process_and_needs_as_many(place, refused):
    left = place.folder / "left.partial"
    state = json.loads((left / "state.json").read_text())
    parts = [state["tensors"].replace(".safetensors", f".part-{n}-of-2.safetensors") for n in (1, 2)]
    assert all((left / part).is_file() and part in state["files"] for part in parts)
    message = refused(*place.texts, "-o", place.folder / "left", "--resume")
    assert "processes was 2, is 1" in message
    assert "sharded was True, is False" in message


def test_a_sharded_run_is_measured_before(place, tmp_path):
    """By all processes; one prints, and nothing stays."""
    args = ["plan", place.folder / "llama-source", *place.llama[1:3], "--batch-size", 2, "--device", "cpu", "--json"]
    done = in_group(2, run_command, *args, "--measure", "--shard", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)["totals"]
    assert "(4 rows)" in totals["measured"]
    assert totals["measured"].endswith("on cpu, 2 processes")
    assert totals["peak memory"].endswith("(process, the most of 2)")
    assert not list(tmp_path.iterdir())


def test_one_process_has_nothing_to_divide(made, refused, tmp_path):
    message = refused(made / "gpt2", "--data", made / "documents.txt", "-o", tmp_path / "out", *STEPS, "--shard")
    assert "torchrun --nproc-per-node" in message
    assert not (tmp_path / "out.partial").exists()


def test_options_of_memory_name_what_they_need(made, refused, tmp_path):
    args = [made / "gpt2", "--data", made / "documents.txt", "-o", tmp_path / "out", *STEPS]
    assert "give --shard too" in refused(*args, "--cpu-offload")
    with pytest.raises(UsageError, match="this model cannot compute activations again"):
        checkpoint_activations(torch.nn.Linear(2, 2))


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
        ({}, {"compile": True}, "causal-lm", "--compile"),
        ({}, {}, "image-captioning", "the task image-captioning"),
        ({"mixed_precision": "fp16"}, {}, "causal-lm", "--mixed-precision fp16"),
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


def test_parts_of_experts_are_refused_by_name():
    layers = [Layer.of_parameter("head", torch.zeros(2, 2)), Layer("moe.w", (6, 2), (TensorSlice("moe.w"),), groups=3)]
    loop = SimpleNamespace(shards=SimpleNamespace(divides_experts=lambda layer: layer.groups > 1))
    with pytest.raises(UsageError, match=r"moe\.w, in which the file fuses several experts"):
        sharded.refuse_layers(layers, loop)


def test_the_blocks_of_a_model_are_its_repeated_layers():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    bert = AutoModelForMaskedLM.from_config(config)
    assert repeated_blocks(bert) == list(bert.bert.encoder.layer)
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=3)
    assert repeated_blocks(vit) == list(vit.blocks)


def test_embeddings_that_share_nothing_are_divided_by_themselves():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    llama, tied = (AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=tie)) for tie in (False, True))
    assert divided_parts(llama) == [*llama.model.layers, llama.model.embed_tokens, llama.lm_head]
    assert divided_parts(tied) == [*tied.model.layers]
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=3)
    assert divided_parts(vit) == list(vit.blocks)
    assert divided_parts(torch.nn.Linear(3, 4)) == []
