"""From file to model and back: where tensors live, what is written, what passes through byte for byte."""

import errno
import json
import os
import re
import stat
from contextlib import nullcontext

import builders
import pytest
import timm
import torch
import transformers
from conftest import hashes
from safetensors.torch import load_file

from dsd_refine.checkpoint import write
from dsd_refine.checkpoint.checkpoint import open_checkpoint
from dsd_refine.checkpoint.file_values import FileValues
from dsd_refine.checkpoint.layout import read_layout
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.libraries.skip_init import SkipInit
from dsd_refine.checkpoint.placement import TensorSlice, gather, place, trace_by_parts, within
from dsd_refine.checkpoint.source import find_source
from dsd_refine.errors import CheckpointError, RunError


def opened(folder, task=None):
    source = find_source(str(folder))
    return open_checkpoint(source, open_library(source, task))


def perturb(model):
    """Move every parameter, as training does (ties move together)."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)


def written(checkpoint, folder):
    folder.mkdir()
    checkpoint.write(checkpoint.model, folder)
    return read_layout(folder)


def raw(layout, name):
    file, entry = layout.where[name]
    return bytes(file.raw(entry))


def legacy(tensors):
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }


def test_nothing_changed_gives_every_file_byte_for_byte(tmp_path):
    for made in (builders.timm_checkpoint(tmp_path / "t"), builders.gpt2_checkpoint(tmp_path / "g")):
        layout = written(opened(made), tmp_path / f"out-{made.name}")
        for path in made.iterdir():
            assert (layout.folder / path.name).read_bytes() == path.read_bytes()


def test_the_hashes_that_writing_returns_are_those_of_the_files(tmp_path):
    folder = builders.gpt2_checkpoint(tmp_path / "g")
    tensors = list(load_file(folder / "model.safetensors").items())
    tensors += [("foreign.empty", torch.empty(0, 3)), ("foreign.odd", torch.ones(3, dtype=torch.uint8))]
    builders.write_shards(folder, {f"model-{i}.safetensors": dict(tensors[i::2]) for i in range(2)})
    checkpoint = opened(folder)
    perturb(checkpoint.model)
    (tmp_path / "out").mkdir()
    told = checkpoint.write(checkpoint.model, tmp_path / "out")
    assert told == hashes(tmp_path / "out")
    assert {name for name, digest in told.items() if digest != checkpoint.hashes()[name]} == set(checkpoint.weight_files[:2])


def test_legacy_names_come_back_under_their_own_spelling(tmp_path):
    folder = builders.bert_checkpoint(tmp_path / "b")
    builders.write_tensors(folder / "model.safetensors", legacy(load_file(folder / "model.safetensors")))
    checkpoint = opened(folder)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")
    name = "bert.encoder.layer.0.output.LayerNorm.gamma"
    assert torch.equal(layout.tensor(name), checkpoint.model.state_dict()[name.replace("gamma", "weight")])


def test_a_second_copy_of_a_tied_tensor_is_trained_under_any_name(tmp_path):
    folder = builders.gpt2_checkpoint(tmp_path / "g")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    tensors |= {"lm_head.weight": tensors["wte.weight"].clone(), "h.0.attn.bias": torch.tril(torch.ones(1, 1, 32, 32))}
    builders.write_tensors(folder / "model.safetensors", tensors)
    checkpoint = opened(folder)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")
    assert raw(layout, "wte.weight") == raw(layout, "lm_head.weight") != raw(checkpoint.layout, "wte.weight")
    assert raw(layout, "h.0.attn.bias") == raw(checkpoint.layout, "h.0.attn.bias")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_head_that_differs_from_its_embedding_is_kept_as_two_with_a_warning(tmp_path):
    folder = builders.gpt2_checkpoint(tmp_path / "g")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    builders.write_tensors(folder / "model.safetensors", tensors)
    checkpoint = opened(folder)
    assert any("two different tensors" in warning for warning in checkpoint.warnings)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")
    assert torch.equal(layout.tensor("lm_head.weight"), checkpoint.model.lm_head.weight)
    assert torch.equal(layout.tensor("transformer.wte.weight"), checkpoint.model.transformer.wte.weight)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_experts_fused_by_model_or_file_come_back_as_the_file_has_them(tmp_path, family):
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 24, "num_local_experts": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    made = {
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**common)),
        "gpt-oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**common, head_dim=8)),
    }
    with builders.seeded(0):
        model = made[family]()
    builders.save_transformers(model, tmp_path / "m")
    checkpoint = opened(tmp_path / "m")
    experts = [name for name in checkpoint.layout.names() if ".experts." in name]
    assert len(experts) == (24 if family == "mixtral" else 8)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")
    assert all(raw(layout, name) != raw(checkpoint.layout, name) for name in experts)
    again = opened(tmp_path / "out")
    for name, value in checkpoint.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


def test_weight_norm_pairs_keep_the_old_spelling(tmp_path):
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 3, 3))

    with builders.seeded(0):
        model = Normed()
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1", "bias": "bias"}
    tensors = {f"conv.{old}": model.state_dict()[f"conv.{name}"].clone() for old, name in new.items()}
    builders.write_tensors(tmp_path / "model.safetensors", tensors)

    def load(given, dtype):
        fresh = Normed().to(dtype)
        fresh.load_state_dict({f"conv.{name}": given[f"conv.{old}"] for old, name in new.items()})
        return fresh

    layout = read_layout(tmp_path)
    placement = place(layout, load(tensors, torch.float32), load, lambda name: True)
    assert {name: parts[0].key for name, parts in placement.items()} == {f"conv.{old}": f"conv.{n}" for old, n in new.items()}


class Square(torch.nn.Module):
    def __init__(self, value, dtype):
        super().__init__()
        self.inner = torch.nn.Parameter(value.to(dtype))


@pytest.mark.parametrize(
    "move", [lambda t: t.T, lambda t: t.flip(0), lambda t: t.reshape(2, 2, 4).transpose(0, 1).reshape(4, 4)]
)
def test_any_permutation_is_found_and_undone(tmp_path, move):
    value = torch.arange(16.0).reshape(4, 4)
    builders.write_tensors(tmp_path / "model.safetensors", {"outer": value})

    def load(given, dtype):
        return Square(move(given["outer"]).contiguous(), dtype)

    layout = read_layout(tmp_path)
    model = load({"outer": value}, torch.float32)
    parts = place(layout, model, load, lambda name: True)["outer"]
    assert torch.equal(gather(parts, torch.zeros(4, 4), model.state_dict()), value)
    inner = torch.zeros(16)
    for part in parts:
        inner[part.target] = value.reshape(-1)[part.source]
    assert torch.equal(inner.reshape(4, 4), model.inner)


# What a library does with the tensors of a block: name in the model -> its tensor, from those of the file, a and b (4 x 4)
FORMS = {
    "stacked": {"inner": lambda t: torch.stack([t["a"], t["b"]])},
    "joined": {"inner": lambda t: torch.cat([t["b"], t["a"]], 0)},
    "joined by columns": {"inner": lambda t: torch.cat([t["a"], t["b"]], 1)},
    "split": {"one": lambda t: t["a"][:1], "rest": lambda t: t["a"][1:], "other": lambda t: t["b"]},
    "turned and stacked": {"inner": lambda t: torch.stack([t["a"].T, t["b"].T])},
}


class Blocks(torch.nn.Module):
    """Two blocks that hold tensors in one of FORMS, and a tensor outside of blocks."""

    def __init__(self, form, given, dtype):
        super().__init__()
        own = ({name: given[f"blocks.{number}.{name}"] for name in "ab"} for number in range(2))
        held = [{key: make(tensors).contiguous().to(dtype) for key, make in FORMS[form].items()} for tensors in own]
        self.blocks = torch.nn.ModuleList(
            torch.nn.ParameterDict({key: torch.nn.Parameter(value) for key, value in block.items()}) for block in held
        )
        self.outer = torch.nn.Parameter(given["outside"].to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_tracing_block_by_block_finds_what_one_load_finds(tmp_path, form):
    """And what the model holds is put together from the files."""
    names = [f"blocks.{number}.{name}" for number in range(2) for name in "ab"]
    tensors = {name: torch.randn(4, 4) for name in names} | {"outside": torch.randn(3)}
    builders.write_tensors(tmp_path / "model.safetensors", tensors)
    loads = []

    def load(given, dtype):
        loads.append(sum(tensor.numel() for tensor in given.values() if not tensor.is_meta))
        return Blocks(form, given, dtype)

    layout = read_layout(tmp_path)
    model = load(tensors, torch.float32)
    once = place(layout, model, load, lambda name: True)
    del loads[:]
    parts = trace_by_parts(layout, load, tensors)
    assert sorted(loads) == [3, 32, 32]
    assert parts.keys() == once.keys()
    for name, slices in once.items():
        assert [(each.key, elements(each.source), elements(each.target)) for each in slices] == [
            (each.key, elements(each.source), elements(each.target)) for each in parts[name]
        ]
        assert torch.equal(gather(parts[name], torch.zeros_like(tensors[name]), model.state_dict()), tensors[name])
    values = FileValues(parts, layout.mapped(), model.state_dict())
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def elements(index):
    """A slice or a tensor of indices, as a list."""
    return list(range(1000))[index] if isinstance(index, slice) else index.tolist()


def test_elements_that_follow_one_another_take_no_memory(tmp_path):
    builders.write_tensors(tmp_path / "model.safetensors", {name: torch.randn(4, 4) for name in "ab"})

    def load(given, dtype):
        return Square(torch.stack([given["a"], given["b"]]), dtype)

    layout = read_layout(tmp_path)
    placement = place(layout, load(layout.mapped(), torch.float32), load, lambda name: True)
    assert placement == {
        "a": (TensorSlice("inner", slice(0, 16), slice(0, 16)),),
        "b": (TensorSlice("inner", slice(0, 16), slice(16, 32)),),
    }


@pytest.mark.parametrize("index", [slice(4, 9), torch.arange(4, 9), torch.tensor([8, 4, 5, 7, 6])])
def test_the_elements_within_a_range_are_counted_from_its_start(index):
    every = elements(index)
    for start in range(12):
        for stop in range(start, 12):
            found = within(index, start, stop)
            assert ([] if found is None else elements(found)) == [each - start for each in every if start <= each < stop]


def test_a_tensor_that_a_loader_uses_twice_is_refused(tmp_path):
    """Both places would train, and the file has room for one."""
    builders.write_tensors(tmp_path / "model.safetensors", {"outer": torch.ones(2, 4)})

    def load(given, dtype):
        return Square(torch.cat([given["outer"], given["outer"]]), dtype)

    with pytest.raises(CheckpointError, match=r"inner.*cannot be written back"):
        place(read_layout(tmp_path), load({"outer": torch.ones(2, 4)}, torch.float32), load, lambda name: True)


def test_a_loader_that_computes_is_refused(tmp_path):
    builders.write_tensors(tmp_path / "model.safetensors", {"outer": torch.ones(4, 4)})

    def load(given, dtype):
        return Square(given["outer"] * 0.5, dtype)

    with pytest.raises(CheckpointError, match=r"inner.*cannot be written back"):
        place(read_layout(tmp_path), load({"outer": torch.ones(4, 4)}, torch.float32), load, lambda name: True)


def test_a_missing_head_is_named(tmp_path):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("classifier")}
    builders.write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"classifier\.bias, classifier\.weight"):
        opened(folder)


def test_a_missing_timm_tensor_is_named(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n != "fc.weight"}
    builders.write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        opened(folder)


def test_missing_batchnorm_statistics_are_named(tmp_path):
    """Where timm loads loosely by itself (dla, mobilenetv5), it would evaluate with a fresh layer's."""
    folder = builders.timm_checkpoint(tmp_path / "t", arch="dla46_c")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n != "base_layer.1.running_var"}
    builders.write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"base_layer\.1\.running_var"):
        opened(folder)


MORE = {"old.weight": torch.ones(3, 4), "old.count": torch.tensor(5)}


@pytest.mark.parametrize("arch", ["test_resnet", "mobilenetv3_small_050"])  # whose builder sets pretrained_strict itself
def test_a_timm_file_with_more_tensors_than_the_model_keeps_them(tmp_path, arch):
    folder = builders.timm_checkpoint(tmp_path / "t", arch=arch)
    builders.write_tensors(folder / "model.safetensors", {**load_file(folder / "model.safetensors"), **MORE})
    checkpoint = opened(folder)
    assert any("old.weight, old.count" in warning for warning in checkpoint.warnings)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")
    moved = dict(checkpoint.model.named_parameters())
    for name in layout.names():
        assert (raw(layout, name) != raw(checkpoint.layout, name)) is (name in moved), name
    plain = checkpoint.library.load_plain(tmp_path / "out").state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in checkpoint.model.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected"):  # a model that was let off keeps no such leave
        checkpoint.model.load_state_dict({**plain, **MORE})


@pytest.mark.parametrize("arch", ["test_resnet", "mobilenetv3_small_050"])
def test_tensors_too_many_do_not_stand_in_for_missing_ones(tmp_path, arch):
    folder = builders.timm_checkpoint(tmp_path / "t", arch=arch)
    tensors = {**load_file(folder / "model.safetensors"), **MORE}
    lost = [name for name in tensors if name.endswith(("running_var", "conv1.weight", "conv_stem.weight"))][:2]
    builders.write_tensors(folder / "model.safetensors", {n: t for n, t in tensors.items() if n not in lost})
    with pytest.raises(CheckpointError) as refused:
        opened(folder)
    assert all(name in str(refused.value) for name in lost)


def resnet(folder):
    """transformers' own, which has BatchNorm."""
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return builders.save_transformers(transformers.ResNetForImageClassification(config), folder)


def test_a_file_without_counts_starts_them_at_0_and_comes_back_without(tmp_path):
    """As those written before BatchNorm counted: neither a missing parameter, nor a tensor to be added."""
    folder = resnet(tmp_path / "r")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith("num_batches_tracked")}
    builders.write_tensors(folder / "model.safetensors", tensors)
    checkpoint = opened(folder)
    counts = {int(value) for name, value in checkpoint.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {0}
    perturb(checkpoint.model)
    for buffer in checkpoint.model.buffers():
        buffer.add_(1)
    layout = written(checkpoint, tmp_path / "out")
    assert layout.files[0].head == checkpoint.layout.files[0].head
    assert all(torch.equal(layout.tensor(name), checkpoint.model.state_dict()[name]) for name in tensors)
    assert set(tensors) == set(layout.names())


def test_a_missing_statistic_beside_missing_counts_is_still_named(tmp_path):
    folder = resnet(tmp_path / "r")
    lost = "resnet.embedder.embedder.normalization.running_var"
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith("_tracked") and n != lost}
    builders.write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"running_var\.$") as refused:
        opened(folder)
    assert "num_batches_tracked" not in str(refused.value)


def test_counts_under_old_names_are_written_as_counted(tmp_path):
    """A file without the base model's prefix holds `num_batches_tracked` without it too: the model's, not foreign."""
    folder = resnet(tmp_path / "r")
    saved = {n.removeprefix("resnet."): t for n, t in load_file(folder / "model.safetensors").items()}
    builders.write_tensors(folder / "model.safetensors", saved, {"format": "pt"})
    checkpoint = opened(folder)
    for name, buffer in checkpoint.model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(77)
    layout = written(checkpoint, tmp_path / "out")
    counts = [name for name in layout.names() if name.endswith("num_batches_tracked")]
    assert counts
    assert {int(layout.tensor(name)) for name in counts} == {77}


def test_the_worst_file_comes_back_with_every_untouched_byte_in_place(tmp_path):
    """Shards, an index, a redundant tied copy, three dtypes, legacy names, foreign tensors, metadata: all at once."""
    folder = builders.gpt2_checkpoint(tmp_path / "g")
    own = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    names = sorted(own)
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    typed = {n: own[n].to(torch.bfloat16 if n == "wte.weight" else dtypes[i % 3]) for i, n in enumerate(names)}
    typed["lm_head.weight"] = typed["wte.weight"].clone()
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000, 1], dtype=torch.int32).view(torch.float32)
    foreign = {
        "foreign.nan": bits,
        "foreign.count": torch.tensor(7),
        "foreign.double": torch.tensor([0.1], dtype=torch.float64),
        "foreign.flags": torch.tensor([True, False, True]),
        "foreign.empty": torch.empty(0, 3),
        "h.0.attn.bias": torch.tril(torch.ones(1, 1, 32, 32, dtype=torch.uint8)),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    everything = list((typed | foreign).items())
    metadata = {"format": "pt", "made by": "hand", "é": "\n"}
    builders.write_shards(folder, {f"model-{i}.safetensors": dict(everything[i::3]) for i in range(3)}, metadata)
    checkpoint = opened(folder)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")

    assert [(f.name, f.head) for f in layout.files] == [(f.name, f.head) for f in checkpoint.layout.files]
    assert layout.index.read_bytes() == (folder / "model.safetensors.index.json").read_bytes()
    for name in foreign:
        assert raw(layout, name) == raw(checkpoint.layout, name), name
    for name in typed:
        assert raw(layout, name) != raw(checkpoint.layout, name), name
        assert layout.entry(name).dtype == typed[name].dtype
    assert raw(layout, "lm_head.weight") == raw(layout, "wte.weight")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), checkpoint.rounded(checkpoint.model):
        assert torch.equal(loaded(ids).logits, checkpoint.model(ids).logits)


def test_rounding_is_undone_exactly(tmp_path):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(folder / "model.safetensors").items()}
    builders.write_tensors(folder / "model.safetensors", tensors)
    checkpoint = opened(folder)
    assert all(p.dtype == torch.float32 for p in checkpoint.model.parameters())
    perturb(checkpoint.model)
    before = {n: v.clone() for n, v in checkpoint.model.state_dict().items()}
    with checkpoint.rounded(checkpoint.model):
        now = checkpoint.model.state_dict()
        assert any(not torch.equal(now[n], before[n]) for n in before)
        assert all(torch.equal(v, v.to(torch.bfloat16).float()) for v in now.values())
    assert all(torch.equal(v, before[n]) for n, v in checkpoint.model.state_dict().items())


def test_values_that_did_not_change_keep_the_source_s_bits(tmp_path):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] = torch.tensor([-0.0, 0.0])
    builders.write_tensors(folder / "model.safetensors", tensors)
    checkpoint = opened(folder)
    with torch.no_grad():
        checkpoint.model.classifier.bias.zero_()
    assert raw(written(checkpoint, tmp_path / "out"), "classifier.bias") == raw(checkpoint.layout, "classifier.bias")


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = {n: t.to(torch.float16) for n, t in load_file(folder / "model.safetensors").items()}
    builders.write_tensors(folder / "model.safetensors", tensors)
    checkpoint = opened(folder)
    with torch.no_grad():
        checkpoint.model.classifier.weight[0, 0] = 1e6
    with pytest.raises(RunError, match=r"classifier\.weight"):
        written(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(("spoil", "said"), [(lambda t: t.double(), "float64"), (lambda t: t * float("nan"), "not finite")])
def test_weights_that_cannot_be_refined_are_refused_by_name(tmp_path, spoil, said):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = spoil(tensors["classifier.weight"])
    builders.write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=said):
        opened(folder)


def test_side_files_are_copied_other_weights_are_not_and_modes_follow_the_umask(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    (folder / "extra").mkdir()
    (folder / "extra/notes.txt").write_bytes(b"\x00\xff")
    (folder / "generation_config.json").write_bytes(b"not even json")
    for other in ("pytorch_model.bin", "model.onnx", "dsd/old", ".cache/x", "README.md"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"stale")
    (folder / "model.safetensors").chmod(0o600)
    before = os.umask(0o027)
    try:
        written(opened(folder), tmp_path / "out")
    finally:
        os.umask(before)
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "extra/notes.txt", "generation_config.json"}
    assert (tmp_path / "out/extra/notes.txt").read_bytes() == b"\x00\xff"
    assert {stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in found} == {0o640}
    assert any("pytorch_model.bin" in warning and "model.onnx" in warning for warning in opened(folder).warnings)


@pytest.mark.parametrize("build", [builders.timm_checkpoint, builders.bert_checkpoint, builders.gpt2_checkpoint])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_opened_model_is_float32_and_no_longer_hangs_on_its_file(tmp_path, build, dtype):
    """It is read through a view of the file, which a download into the same place would change under the training."""
    folder = build(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(path).items()}
    builders.write_tensors(path, tensors, {"format": "pt"})
    model = opened(folder).model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_that_a_file_fills_is_built_without_drawing_its_weights():
    torch.manual_seed(0)
    with SkipInit():
        layer, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        bare = torch.nn.init.trunc_normal_(torch.nn.Parameter(torch.full((5,), 7.0)))
        drawn = torch.empty(5).normal_()
    assert not layer.weight.any()
    assert not layer.bias.any()
    assert layer.weight.requires_grad
    assert bare.equal(torch.zeros(5))
    assert norm.weight.equal(torch.ones(4))  # constants are set
    torch.manual_seed(0)
    assert drawn.equal(torch.empty(5).normal_())  # what is no parameter is drawn, and nothing was before


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_it_is_the_same_model_once_it_is_loaded(arch):
    plain = timm.create_model(arch)
    with SkipInit():
        model = timm.create_model(arch)
    model.load_state_dict(plain.state_dict())
    buffers = dict(plain.named_buffers())
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    x = torch.randn(2, 3, 160, 160)
    assert model.eval()(x).equal(plain.eval()(x))


@pytest.mark.parametrize("fails", [False, True])
def test_the_writer_works_on_one_thread_and_gives_the_others_back(tmp_path, monkeypatch, fails):
    """Beside the hash torch's other threads would be waited for; training, after it, has them again."""
    checkpoint = opened(builders.gpt2_checkpoint(tmp_path / "source"))
    seen, real = set(), write.entry_value

    def value(*args):
        seen.add(torch.get_num_threads())
        if fails:
            raise RunError("not this one")
        return real(*args)

    monkeypatch.setattr(write, "entry_value", value)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RunError) if fails else nullcontext():
            written(checkpoint, tmp_path / "out")
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("fails", "ahead"), [(1, write.AHEAD), (2, write.AHEAD), (3, write.AHEAD), (1, 1)])
def test_a_disk_that_fails_is_heard_whichever_sync_it_was(tmp_path, monkeypatch, fails, ahead):
    """Also in the middle of a file (`ahead` 1): the disk says so once, and the file's last sync succeeds."""
    folder = builders.gpt2_checkpoint(tmp_path / "source")
    tensors = list(load_file(folder / "model.safetensors").items())
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    builders.write_shards(folder, {name: dict(tensors[number::3]) for number, name in enumerate(names)})
    checkpoint = opened(folder)
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) == fails:
            raise OSError(errno.EIO, "the disk is broken")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(write, "AHEAD", ahead)
    with pytest.raises(OSError, match="the disk is broken"):
        written(checkpoint, tmp_path / "out")


# ---------------------------------------------------------------- which files are copies of the weights, which are not

COPIES = [
    "pytorch_model.bin", "pytorch_model.fp16.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "model.fp16.safetensors", "model-00001-of-00002.safetensors", "tf_model.h5", "flax_model.msgpack", "rust_model.ot",
    "model.onnx", "onnx/model.onnx", "onnx/config.json", "onnx/model.onnx_data", "x-q4.gguf", "openvino_model.xml",
    "openvino/openvino_model.bin", "coreml/text.mlpackage/Data/weights/weight.bin", "original/consolidated.00.pth",
    "consolidated.safetensors", "metal/model.bin", "64.tflite", "model.pth", "last.ckpt", "Model.ONNX", "optimizer.pt",
    "model_best.pth.tar", "checkpoint0099.pth", "epoch=3-step=40.ckpt", "weights.npz", "pytorch_model.pt", "model.h5", "model.pkl",
    "scheduler.pt", "rng_state_0.pth", "optimizer.bin", "weights.00.npz", "best.pt", "consolidated.00.pth", "Checkpoint_12.PT", "export.pkl",
    "checkpoint-500/model.safetensors", "bert_model.ckpt.data-00000-of-00001", "open_clip_pytorch_model.bin",
]  # fmt: skip
OWN = [
    "language_model/5gram.bin", "5gram.bin", "language_model/unigrams.txt", "adapter.fra.safetensors", "adapter.fra.bin",
    "preprocessor.npz", "vocab.bin", "training_args.bin", "original/params.json", "original/tokenizer.model", "vocab.pkl",
    "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "voices/one.pt", "index.faiss", "stats.h5", "speakers.msgpack",
    "label_encoder.pt", "normalizer.ckpt", "vocab.pth", "model_head.pkl", "weights_of_classes.npz", "model_card.safetensors",
    "model-card.safetensors", "model_stats.h5", "consolidated_names.txt", "modeling.pt", "scaler.pt", "lasting.pth.tar", "scalers.pkl",
    "nested/onnx/notes.txt", "model_card.md", "spiece.model", "runs/events.out.tfevents",
]  # fmt: skip


def test_known_copies_of_the_weights_are_left_out_and_everything_else_is_copied_byte_for_byte(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    for name in COPIES + OWN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00" + name.encode())
    checkpoint = opened(folder)
    written(checkpoint, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {*OWN, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in OWN)
    _, left, links = checkpoint.source.side_files(set(checkpoint.weight_files))
    folders = {name for name in left if name.endswith("/")}
    assert folders == {"onnx/", "openvino/", "coreml/", "metal/", "checkpoint-500/"}
    assert all(name in left or f"{name.split('/')[0]}/" in folders for name in COPIES)
    assert links == []


LOOSE = ("resnet-14fe96d1.pth", "a.pt", "mine.pth.tar", "b.ckpt", "c.pkl", "d.npz", "e.h5", "model_fp16.safetensors", "F.PTH")


@pytest.mark.parametrize("name", LOOSE)
def test_a_file_of_an_ending_that_says_nothing_is_a_copy_where_it_is_half_as_large_as_the_weights(tmp_path, name):
    folder = builders.timm_checkpoint(tmp_path / "t")
    (folder / "deep").mkdir()
    half = -(-(folder / "model.safetensors").stat().st_size // 2)
    for size, kept in ((half - 1, True), (half, False), (3 * half, False)):
        for path in (folder / name, folder / "deep" / name, folder / "notes.bin", folder / "adapter.fra.safetensors"):
            path.write_bytes(b"\x00" * size)
        checkpoint = opened(folder)
        assert (name in checkpoint.side_files) == kept
        assert {f"deep/{name}", "notes.bin", "adapter.fra.safetensors"} <= {*checkpoint.side_files}
        assert (
            any(
                f"not copied (other copies of the weights, a trainer's state, or ours to write): {name}" in warning
                for warning in checkpoint.warnings
            )
            != kept
        )


@pytest.mark.parametrize(("place", "wanted"), [("", True), ("voices", True), ("a/b", True), ("onnx", False), (".git/x", False)])
def test_a_folder_of_the_source_that_cannot_be_read_is_refused_where_an_output_would_have_its_files(
    tmp_path, monkeypatch, place, wanted
):
    folder = builders.timm_checkpoint(tmp_path / "t")
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / "file.txt").write_text("x")
    real = os.scandir

    def scandir(path):
        if str(path).rstrip("/") == str(folder / place):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    if not wanted:
        assert "file.txt" not in find_source(str(folder)).side_files({"model.safetensors"})[0]
        return
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied; an output would lack what is in it"):
        find_source(str(folder))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pth"])
def test_what_is_read_is_not_called_a_copy(tmp_path, weights):
    folder = builders.timm_checkpoint(tmp_path / "t")
    torch.save(load_file(folder / "model.safetensors"), folder / weights)
    (folder / "model.safetensors").unlink()
    source = find_source(str(folder))
    checkpoint = open_checkpoint(source, open_library(source), allow_pickle=True)
    assert not any(weights in warning for warning in checkpoint.warnings)
    written(checkpoint, tmp_path / "out")
    assert set(hashes(tmp_path / "out")) == {"config.json", "model.safetensors"}


def test_an_adapter_of_what_is_trained_is_named_and_one_of_another_language_is_not(tmp_path):
    """wav2vec2's: `target_lang` lays them over the weights."""
    folder = builders.ctc_checkpoint(tmp_path / "c", do_stable_layer_norm=True, adapter_attn_dim=4)
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if "adapter_layer" in name or name.startswith("lm_head")}
    assert len(own) > 2
    builders.write_tensors(folder / "adapter.eng.safetensors", own)
    builders.write_tensors(folder / "adapter.fra.safetensors", own | {"lm_head.weight": own["lm_head.weight"] + 1})
    said = [warning for warning in opened(folder).warnings if "adapters that the weights hold too" in warning]
    assert len(said) == 1
    assert "adapter.eng.safetensors; " in said[0]
    assert "fra" not in said[0]


# ---------------------------------------------------------------- refusals say what it is


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("build", [builders.timm_checkpoint, builders.bert_checkpoint, builders.torchvision_checkpoint])
def test_quantised_weights_are_named_with_their_dtype(tmp_path, build, dtype):
    """timm and torchvision would load them as they are, without their scales."""
    folder = build(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
    builders.write_tensors(folder / "model.safetensors", {**tensors, name: (tensors[name] * 100).to(dtype)})
    said = f"quantised weights ({str(dtype).removeprefix('torch.')} in tensor {name}) cannot be refined"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        opened(folder)


def test_a_bias_of_whole_numbers_is_none_either(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    tensors = load_file(folder / "model.safetensors")
    builders.write_tensors(folder / "model.safetensors", {**tensors, "fc.bias": torch.ones(3, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"quantised weights \(int8 in tensor fc\.bias\)"):
        opened(folder)


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_positions_of_another_grid_are_refused_with_both_sizes_and_the_setting(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t", arch="test_vit", size=160)
    config = json.loads((folder / "config.json").read_text())
    set_config(folder, model_args={**config["model_args"], "img_size": 128})
    with pytest.raises(CheckpointError, match=r"pos_embed is 1x101x64 in the file, but 1x65x64 in the model.*`img_size`"):
        opened(folder)
    folder = set_config(builders.vit_checkpoint(tmp_path / "v", size=32), image_size=48)
    with pytest.raises(CheckpointError, match=r"position_embeddings is 1x17x32 in the file, but 1x37x32 in.*`image_size`"):
        opened(folder)


def test_a_head_of_other_classes_is_refused_with_both_sizes(tmp_path):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    builders.write_tensors(folder / "model.safetensors", {**tensors, "classifier.weight": torch.ones(5, 32)})
    with pytest.raises(CheckpointError, match=r"classifier\.weight is 5x32 in the file, but 2x32 in the model"):
        opened(folder)


HEADLESS = "Is it a base model without its head?"


@pytest.mark.parametrize(
    ("lost", "guessed"),
    [("classifier.", True), ("classifier.bias", False), ("bert.pooler.", False), ("bert.encoder.layer.1.", False), ("", False)],
)
def test_a_base_model_is_guessed_only_where_exactly_the_head_is_missing(tmp_path, lost, guessed):
    folder = builders.bert_checkpoint(tmp_path / "b")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith(lost)}
    builders.write_tensors(folder / "model.safetensors", {**tensors, "other": torch.ones(1)})
    with pytest.raises(CheckpointError) as refused:
        opened(folder)
    assert (HEADLESS in str(refused.value)) is guessed
    assert "the weights lack what BertForSequenceClassification needs" in str(refused.value)


def test_a_head_that_is_not_its_embedding_is_named_with_it(tmp_path):
    folder = builders.gpt2_checkpoint(tmp_path / "g")
    tensors = load_file(folder / "model.safetensors")
    builders.write_tensors(folder / "model.safetensors", {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    assert any("two different tensors, lm_head.weight and transformer.wte.weight: kept" in w for w in opened(folder).warnings)


@pytest.mark.parametrize("before", ["module.", "_orig_mod.module."])
def test_a_timm_file_that_a_wrapper_saved_is_loaded_as_timm_does_and_keeps_its_names(tmp_path, before):
    folder = builders.timm_checkpoint(tmp_path / "t")
    tensors = load_file(folder / "model.safetensors")
    builders.write_tensors(folder / "model.safetensors", {f"{before}{name}": tensor for name, tensor in tensors.items()})
    checkpoint = opened(folder)
    perturb(checkpoint.model)
    layout = written(checkpoint, tmp_path / "out")
    assert list(layout.names()) == [f"{before}{name}" for name in tensors]
    plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in checkpoint.model.state_dict().items())


# ---------------------------------------------------------------- a value that the file cannot hold


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        (torch.float16, 70_000.0, "brought a value to 70,000, and float16, which the source's file has, ends at 65,504"),
        (torch.float16, -1e6, "brought a value to 1,000,000, and float16"),
        (torch.bfloat16, 3.4e38, "and bfloat16, which the source's file has, ends at"),
        (torch.float16, float("nan"), "holds values that are not finite after training"),
        (torch.float32, float("nan"), "holds values that are not finite after training"),
        (torch.float32, float("inf"), "holds values that are not finite after training"),
        (torch.float32, float("-inf"), "holds values that are not finite after training"),
    ],
)
def test_a_value_that_cannot_be_written_is_found_when_it_is_first_rounded(tmp_path, dtype, value, said):
    folder = builders.timm_checkpoint(tmp_path / "t")
    path = folder / "model.safetensors"
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(path).items()}
    builders.write_tensors(path, tensors)
    checkpoint = opened(folder)
    with checkpoint.rounded(checkpoint.model):
        pass
    checkpoint.model.get_buffer("conv1.1.running_var")[3] = value
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    with pytest.raises(RunError, match=rf"conv1\.1\.running_var: .*{re.escape(said)}"), checkpoint.rounded(checkpoint.model):
        raise AssertionError("it was rounded")
    assert all(tensor.equal(before[n]) or n == "conv1.1.running_var" for n, tensor in checkpoint.model.state_dict().items())
