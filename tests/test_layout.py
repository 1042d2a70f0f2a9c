"""The files as they are: headers held against the format, indexes against the files, pickles read weights-only."""

import argparse
import itertools
import json
import os
import re
import struct
import warnings
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from builders import write_shards, write_tensors
from safetensors.torch import load, load_file, save_file
from timm.models import load_state_dict

from dsd_refine.checkpoint import layout
from dsd_refine.checkpoint.layout import read_index, read_layout
from dsd_refine.checkpoint.safetensors_file import HEADER_LIMIT, NAMES, build_header, memory, read_header, read_json
from dsd_refine.errors import CheckpointError

TWO = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int64)}


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_header_of_a_file_that_safetensors_wrote(tmp_path):
    tensors = {**TWO, "half": torch.ones(3, dtype=torch.bfloat16), "one": torch.tensor(7.0), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "other": "é"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.metadata == {"format": "pt", "other": "é"}
    assert (tmp_path / "x.safetensors").read_bytes().startswith(found.head)
    assert {e.name for e in found.entries} == set(tensors)
    for e in found.entries:
        held = found.tensor(e)
        assert (e.dtype, e.shape) == (tensors[e.name].dtype, tuple(tensors[e.name].shape))
        assert held.dtype == e.dtype
        assert torch.equal(held, tensors[e.name])
    assert [e.begin for e in found.entries] == sorted(e.begin for e in found.entries)


def test_truncated_at_any_length(tmp_path):
    whole = write_tensors(tmp_path / "x.safetensors", TWO).read_bytes()
    short = tmp_path / "short.safetensors"
    for length in (0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 1):
        short.write_bytes(whole[:length])
        refused(short, r"cut short|truncated|broken")


def test_bytes_too_many(tmp_path):
    path = write_tensors(tmp_path / "x.safetensors", TWO)
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "the file has")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_lfs_pointer(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        read_header(path) if name.endswith("safetensors") else read_json(path)


def test_overlap(tmp_path):
    refused(write_raw(tmp_path / "x", {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps")


def test_gap(tmp_path):
    refused(write_raw(tmp_path / "x", {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "leaves a gap")


def test_gap_at_the_start(tmp_path):
    refused(write_raw(tmp_path / "x", {"a": entry(4, 8)}, bytes(8)), "leaves a gap")


def test_name_twice(tmp_path):
    text = b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2)
    refused(write_raw(tmp_path / "x", text, bytes(4)), "twice")


@pytest.mark.parametrize("dtype", ["I4", "F4", "F8_E8M0", "GGUF", "", None])
def test_unknown_or_quantised_dtype(tmp_path, dtype):
    refused(write_raw(tmp_path / "x", {"a": entry(0, 4, [1], dtype)}, bytes(4)), "dtype .*refused")


@pytest.mark.parametrize("shape", [[3], [2, 2], []])
def test_shape_that_does_not_fit(tmp_path, shape):
    refused(write_raw(tmp_path / "x", {"a": entry(0, 8, shape)}, bytes(8)), "does not fit")


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]},
    ],
)
def test_broken_entry(tmp_path, value):
    refused(write_raw(tmp_path / "x", {"a": value}, bytes(4)), "entry for 'a' is broken")


@pytest.mark.parametrize("metadata", [[], "pt", {"a": 1}, {"a": None}])
def test_metadata_is_text_to_text(tmp_path, metadata):
    refused(write_raw(tmp_path / "x", {"__metadata__": metadata, "a": entry(0, 4)}, bytes(4)), "metadata")


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xff", b'{"a":' * 50_000, b"   "])
def test_header_that_is_no_object(tmp_path, text):
    refused(write_raw(tmp_path / "x", text), "header")


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_header_length_out_of_range(tmp_path, length):
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":1}' + bytes(100))
    refused(path, "not a safetensors file, or cut short")


def test_header_length_over_the_formats_limit(tmp_path):
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(HEADER_LIMIT + 100)
    refused(path, "not a safetensors file")


def test_file_that_is_not_there(tmp_path):
    refused(tmp_path / "x", "cannot be read")


def test_file_changed_after_its_header_was_read(tmp_path):
    found = read_header(write_tensors(tmp_path / "x", TWO))
    os.truncate(tmp_path / "x", len(found.head) + 4)
    with pytest.raises(CheckpointError, match="changed meanwhile"):
        found.raw(found.entries[0])


def test_layout_in_file_order_across_shards(tmp_path):
    write_shards(tmp_path, {"2.safetensors": {"z": torch.ones(2), "a": torch.zeros(1)}, "1.safetensors": {"m": torch.ones(1)}})
    found = read_layout(tmp_path)
    assert [file.name for file in found.files] == ["2.safetensors", "1.safetensors"]
    assert list(found.names()) == ["z", "a", "m"]
    assert found.index == tmp_path / layout.INDEX
    assert torch.equal(found.tensor("z"), torch.ones(2))


def test_one_file_of_any_name(tmp_path):
    write_tensors(tmp_path / "weights.safetensors", TWO)
    assert [file.name for file in read_layout(tmp_path).files] == ["weights.safetensors"]


def test_several_files_without_an_index(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        write_tensors(tmp_path / name, TWO)
    with pytest.raises(CheckpointError, match=r"x\.safetensors, y\.safetensors"):
        read_layout(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no weights here"):
        read_layout(tmp_path)


def test_no_tensors(tmp_path):
    write_tensors(tmp_path / layout.SINGLE, {})
    with pytest.raises(CheckpointError, match="no tensors"):
        read_layout(tmp_path)


def sharded(folder):
    return write_shards(folder, {"1.safetensors": {"a": torch.ones(2)}, "2.safetensors": {"b": torch.ones(3)}})


def edit_index(folder, **weight_map):
    path = folder / layout.INDEX
    index = json.loads(path.read_text())
    index["weight_map"].update(weight_map)
    path.write_text(json.dumps(index))


def test_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard 2\.safetensors"):
        read_layout(tmp_path)


@pytest.mark.parametrize("name", ["../1.safetensors", "/etc/x.safetensors", "sub/1.safetensors", "..", ".", ""])
def test_index_that_climbs_out(tmp_path, name):
    edit_index(sharded(tmp_path), b=name)
    with pytest.raises(CheckpointError, match="outside its own folder"):
        read_layout(tmp_path)


def test_index_that_names_what_can_be_no_file(tmp_path):
    edit_index(sharded(tmp_path), b="A" * 10_000)
    with pytest.raises(CheckpointError, match="a file of 10,000 letters"):
        read_layout(tmp_path)


@pytest.mark.parametrize("value", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_index_that_is_none(tmp_path, value):
    (tmp_path / layout.INDEX).write_text(value)
    with pytest.raises(CheckpointError, match=layout.INDEX):
        read_index(tmp_path / layout.INDEX)


def test_single_file_beside_an_index_that_does_not_name_it(tmp_path):
    write_tensors(sharded(tmp_path) / layout.SINGLE, {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="loaders disagree"):
        read_layout(tmp_path)


def test_single_file_that_the_index_names_counts(tmp_path):
    write_shards(tmp_path, {"x": TWO})
    (tmp_path / "x").rename(tmp_path / layout.SINGLE)
    edit_index(tmp_path, a=layout.SINGLE, b=layout.SINGLE)
    assert list(read_layout(tmp_path).names()) == ["a", "b"]


def test_index_that_names_a_tensor_in_the_wrong_shard(tmp_path):
    edit_index(sharded(tmp_path), a="2.safetensors", b="1.safetensors")
    with pytest.raises(CheckpointError, match="disagree on where these tensors are: a, b"):
        read_layout(tmp_path)


def test_index_that_lacks_a_tensor_of_a_shard(tmp_path):
    sharded(tmp_path)
    write_tensors(tmp_path / "1.safetensors", {"a": torch.ones(2), "more": torch.ones(1)})
    with pytest.raises(CheckpointError, match="disagree on where these tensors are: more"):
        read_layout(tmp_path)


def test_index_that_names_a_tensor_too_many(tmp_path):
    edit_index(sharded(tmp_path), gone="1.safetensors")
    with pytest.raises(CheckpointError, match="disagree on where these tensors are: gone"):
        read_layout(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    write_tensors(tmp_path / "2.safetensors", {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(CheckpointError, match="is in both"):
        read_layout(tmp_path)


def test_built_header_is_one_that_safetensors_reads():
    tensors = {"z": torch.randn(3, 4).T, "é": torch.arange(3, dtype=torch.uint8), "none": torch.empty(2, 0)}
    tensors["tied"] = tensors["z"]
    tensors |= {str(dtype): torch.ones(3).to(dtype) for dtype in NAMES}
    head, entries = build_header(tensors, {"format": "pt"})
    found = load(head + b"".join(memory(t) for t in tensors.values()))
    assert [e.name for e in entries] == list(tensors)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert bytes(memory(found[name])) == bytes(memory(tensor))
    assert len(head) % 8 == 0


class Payload:
    """A pickle that makes a directory when it is loaded without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_needs_leave(tmp_path):
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        read_layout(tmp_path)


def test_pickle_comes_out_as_safetensors(tmp_path):
    tensors = {**TWO, "turned": TWO["a"].T, "tied": TWO["a"]}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = read_layout(tmp_path, allow_pickle=True)
    file = found.files[0]
    assert found.from_pickle
    assert (file.name, list(found.names())) == (layout.SINGLE, list(tensors))
    (tmp_path / "out.safetensors").write_bytes(file.head + b"".join(file.raw(e) for e in file.entries))
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_pickle_of_a_nested_state_dict(tmp_path, key):
    torch.save({key: TWO, "epoch": 3}, tmp_path / "model.pth")
    assert list(read_layout(tmp_path, allow_pickle=True).names()) == ["a", "b"]


def test_safetensors_come_before_a_pickle(tmp_path):
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    write_tensors(tmp_path / layout.SINGLE, TWO)
    assert not read_layout(tmp_path, allow_pickle=True).from_pickle


def test_pickle_with_a_payload_is_refused_and_does_not_run(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"a": torch.ones(1), "b": Payload(trap)}, tmp_path / "pytorch_model.bin")
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="weights-only") as error:
        warnings.simplefilter("ignore")
        read_layout(tmp_path, allow_pickle=True)
    assert not trap.exists()
    assert len(str(error.value).splitlines()) == 1
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)  # the trap would have worked
    assert trap.exists()


@pytest.mark.parametrize("value", [[1, 2], {}, {"a": 1}, {"a": torch.ones(1), "b": "text"}, torch.ones(2)])
def test_pickle_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="plain mapping"):
        read_layout(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()])
def test_pickle_of_tensors_that_no_file_of_ours_can_hold(tmp_path, value):
    torch.save({"a": value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a: "):
        read_layout(tmp_path, allow_pickle=True)


def test_pickle_that_is_truncated_or_a_pointer(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TWO, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_layout(tmp_path, allow_pickle=True)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        read_layout(tmp_path, allow_pickle=True)


def test_model_pickle_counts_not_the_trainers(tmp_path):
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    for name in ("optimizer.pt", "a.pth"):
        torch.save({"wrong": torch.ones(1)}, tmp_path / name)
    assert list(read_layout(tmp_path, allow_pickle=True).names()) == ["a", "b"]


def test_several_pickles_and_none_is_the_model(tmp_path):
    for name in ("x.pth", "y.pt", "z.pth.tar"):
        torch.save(TWO, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x\.pth, y\.pt, z\.pth\.tar"):
        read_layout(tmp_path, allow_pickle=True)


def pickled_shards(folder, **weight_map):
    torch.save({"a": TWO["a"]}, folder / "1.bin")
    torch.save({"b": TWO["b"]}, folder / "2.bin")
    (folder / layout.PICKLE_INDEX).write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin", **weight_map}}))
    return folder


def test_pickle_shards(tmp_path):
    found = read_layout(pickled_shards(tmp_path), allow_pickle=True)
    assert list(found.names()) == ["a", "b"]
    assert found.read_from == ["1.bin", "2.bin", layout.PICKLE_INDEX]


def test_pickle_shard_that_is_missing(tmp_path):
    (pickled_shards(tmp_path) / "2.bin").unlink()
    with pytest.raises(CheckpointError, match=r"2\.bin: is not there"):
        read_layout(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("wrong", [{"b": "1.bin"}, {"c": "2.bin"}])
def test_pickle_index_that_disagrees(tmp_path, wrong):
    with pytest.raises(CheckpointError, match="disagree"):
        read_layout(pickled_shards(tmp_path, **wrong), allow_pickle=True)


# ---------------------------------------------------------------- several sets of weights in one pickle

TIMM_KEYS = ("model", "model_ema", "state_dict", "state_dict_ema")


def sets_of_weights(path, *keys, **more):
    """A training script's file: under each key other values, and what such a script keeps beside them."""
    sets = {key: {"a": torch.full((2, 3), float(number)), "b": torch.ones(4)} for number, key in enumerate(keys)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "arch": "resnet", "optimizer": optimizer, **sets, **more}, path)
    return path


@pytest.mark.parametrize("keys", [k for n in (1, 2, 3, 4) for k in itertools.permutations(TIMM_KEYS, n)][::3])
def test_of_timm_s_own_keys_the_one_is_taken_that_timm_takes_and_the_others_are_named(tmp_path, keys):
    path = sets_of_weights(tmp_path / "last.pth", *keys)
    found = read_layout(tmp_path, allow_pickle=True)
    assert torch.equal(found.tensor("a"), load_state_dict(str(path))["a"])
    left = [key for key in keys if key != found.weights_key]
    said = f"{found.weights_key!r} is taken (as timm does; --weights-key chooses), left: {', '.join(left)}"
    assert [said in note for note in found.notes] == [True] * bool(left)


def weights(value):
    return {"a": torch.full((2, 3), float(value)), "b": torch.ones(4)}


SCALARS = {"decay": torch.tensor(0.9), "updates": 3}


@pytest.mark.parametrize(
    ("saved", "taken", "left"),
    [
        ({"model": weights(1), "ema": {"module": weights(2), "updates": 3}}, "model", "ema.module"),
        ({"ema": {"module": weights(2), **SCALARS}, "state_dict": weights(1)}, "state_dict", "ema.module"),
        ({"model": weights(1), "callbacks": {"EMA": {"shadow": weights(2)}}}, "model", "callbacks.EMA.shadow"),
        ({"model": weights(1), "model_ema": None, "avg": {"x": weights(2), "y": weights(3)}}, "model", "avg.x, avg.y"),
        ({"model": weights(1), "emas": [weights(2), weights(3)]}, "model", "emas.0, emas.1"),
        ({"ema": {"module": weights(2), **SCALARS}, "best": torch.tensor(0.7)}, "ema.module", None),
        ({"net": weights(2), "losses": [torch.tensor(0.3), 0.2], "args": [{"lr": 0.1}]}, "net", None),
        ({"state_dict": {"model": weights(2)}, "scaler": {"scale": torch.tensor(65536.0)}}, "state_dict.model", None),
    ],
)
def test_sets_of_weights_inside_other_mappings_are_found_and_named(tmp_path, saved, taken, left):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}, "a": {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({**saved, "optimizer": optimizer, "epoch": 3}, tmp_path / "last.pth")
    found = read_layout(tmp_path, allow_pickle=True)
    assert found.weights_key == taken
    assert [note.partition("left: ")[2] for note in found.notes] == ([left] if left else [])
    if left:  # whoever names another set gets that one, and timm's loader takes the same
        assert torch.equal(found.tensor("a"), load_state_dict(str(tmp_path / "last.pth"))["a"])
        other = left.split(", ")[-1]
        chosen = read_layout(tmp_path, allow_pickle=True, weights_key=other)
        assert chosen.weights_key == other
        assert not torch.equal(chosen.tensor("a"), found.tensor("a"))


@pytest.mark.parametrize(
    ("saved", "keys"),
    [
        ({"model": weights(1), "model_ema": {"decay": 0.9, "shadow": weights(2)}}, "model, model_ema.shadow"),
        ({"model": weights(1), "model_ema": {**SCALARS, "shadow": weights(2)}}, "model, model_ema.shadow"),
        ({"model": weights(1), "state_dict_ema": {"module": weights(2)}}, "model, state_dict_ema.module"),
        ({"states": {"model": weights(1), "model_ema": weights(2)}}, "states.model, states.model_ema"),
        ({"model": {"student": weights(1), "teacher": weights(2)}}, "model.student, model.teacher"),
        ({"net": weights(1), "ema": {"module": weights(2)}}, "net, ema.module"),
        ({"net": weights(1), "ema": {**SCALARS, "shadow_params": [torch.ones(2, 3)]}}, "net, ema.shadow_params"),
    ],
)
def test_sets_of_weights_that_timms_loader_would_not_find_are_refused_with_their_keys(tmp_path, saved, keys):
    torch.save(saved, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=re.escape(f"several sets of weights ({keys}); say which with --weights-key")):
        read_layout(tmp_path, allow_pickle=True)
    for key in keys.split(", "):
        assert read_layout(tmp_path, allow_pickle=True, weights_key=key).weights_key == key


def test_weights_beside_another_set_of_them_are_not_passed_over(tmp_path):
    torch.save({**weights(1), "ema": {"module": weights(2)}}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=r"holds weights, and under 'ema\.module' another set of them"):
        read_layout(tmp_path, allow_pickle=True)
    assert read_layout(tmp_path, allow_pickle=True, weights_key="ema.module").tensor("a")[0, 0] == 2


def test_a_pickle_that_holds_itself_is_looked_through_once(tmp_path):
    saved = {"ema": {"module": weights(2)}, "model": weights(1)}
    saved["ema"]["all"] = saved
    torch.save(saved, tmp_path / "last.pth")
    assert read_layout(tmp_path, allow_pickle=True).weights_key == "model"


def test_an_average_that_was_never_made_is_passed_over_as_timm_does(tmp_path):
    path = sets_of_weights(tmp_path / "last.pth", "state_dict", state_dict_ema=None)
    found = read_layout(tmp_path, allow_pickle=True)
    assert torch.equal(found.tensor("a"), load_state_dict(str(path))["a"])
    assert found.notes == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pth", "x.pt", "x.pth.tar"])
@pytest.mark.parametrize("keys", [("generator", "discriminator"), ("student", "teacher"), ("net", "ema", "best")])
def test_sets_of_weights_of_which_timm_says_nothing_are_refused_by_name(tmp_path, keys, name):
    sets_of_weights(tmp_path / name, *keys)
    with pytest.raises(CheckpointError, match=rf"several sets of weights \({', '.join(keys)}\); say which with --weights-key"):
        read_layout(tmp_path, allow_pickle=True)
    for number, key in enumerate(keys):
        found = read_layout(tmp_path, allow_pickle=True, weights_key=key)
        assert found.weights_key == key
        assert torch.equal(found.tensor("a"), torch.full((2, 3), float(number)))
        assert f"{key!r} is taken (--weights-key), left: {', '.join(k for k in keys if k != key)}" in found.notes[0]


def test_the_only_set_of_weights_is_taken_whatever_it_is_called(tmp_path):
    sets_of_weights(tmp_path / "x.pth", "net")
    found = read_layout(tmp_path, allow_pickle=True)
    assert (found.weights_key, found.notes, list(found.names())) == ("net", [], ["a", "b"])


@pytest.mark.parametrize("key", ["optimizer", "epoch", "nothing", ""])
def test_a_key_that_holds_no_weights_is_refused_with_those_that_do(tmp_path, key):
    sets_of_weights(tmp_path / "x.pth", "model", "model_ema")
    with pytest.raises(CheckpointError, match=rf"--weights-key {key}: no weights there; the file has model, model_ema"):
        read_layout(tmp_path, allow_pickle=True, weights_key=key)


def test_a_key_goes_with_one_pickle_that_has_keys(tmp_path):
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="the file is itself a mapping of tensors"):
        read_layout(tmp_path, allow_pickle=True, weights_key="a")
    write_tensors(tmp_path / layout.SINGLE, TWO)
    with pytest.raises(CheckpointError, match=r"--weights-key model: .*model\.safetensors is safetensors"):
        read_layout(tmp_path, allow_pickle=True, weights_key="model")
    (tmp_path / "shards").mkdir()
    with pytest.raises(CheckpointError, match="several pickles, which are one set of weights together"):
        read_layout(pickled_shards(tmp_path / "shards"), allow_pickle=True, weights_key="model")


def test_something_else_among_the_weights_is_named_and_does_not_hide_the_set(tmp_path):
    """An average with its decay in it is still the average: it is refused, not passed over for the raw weights."""
    average = {"a": torch.ones(2, 3), "decay": 0.999}
    sets_of_weights(tmp_path / "x.pth", "model", model_ema=average)
    with pytest.raises(CheckpointError, match="under 'model_ema': 'decay' is no tensor"):
        read_layout(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(lr=0.1, out=PurePosixPath("x"))},
        {"metric": np.float64(0.5)},
        {"metric": np.float32(0.5), "epoch": np.int64(3), "best": np.bool_(True)},
        {"args": argparse.Namespace(seen=np.float64(1), nested=argparse.Namespace())},
    ],
)
def test_settings_and_numbers_beside_the_weights_do_no_harm(tmp_path, beside):
    sets_of_weights(tmp_path / "x.pth", "state_dict", **beside)
    assert list(read_layout(tmp_path, allow_pickle=True).names()) == ["a", "b"]


def test_a_payload_among_settings_is_refused_with_the_remedy_and_does_not_run(tmp_path):
    trap = tmp_path / "ran"
    sets_of_weights(tmp_path / "x.pth", "state_dict", args=argparse.Namespace(x=Payload(trap), y=np.float64(1)))
    with (
        warnings.catch_warnings(),
        pytest.raises(CheckpointError, match=r"mkdir, which is no tensor; .* save its weights alone"),
    ):
        warnings.simplefilter("ignore")
        read_layout(tmp_path, allow_pickle=True)
    assert not trap.exists()


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_what_a_wrapper_put_before_every_name_is_taken_away_and_said(tmp_path, before):
    wrapped = {f"{before}{name}": tensor for name, tensor in TWO.items()}
    torch.save({"model_ema": {"n_averaged": torch.tensor(5), **wrapped}}, tmp_path / "x.pth")
    found = read_layout(tmp_path, allow_pickle=True)
    assert list(found.names()) == ["a", "b"]
    assert found.notes == [f"x.pth: names are written without the {before!r} that a training script put there"]


def test_a_module_that_is_only_called_so_keeps_its_name(tmp_path):
    torch.save({"module.a": torch.ones(1), "head.b": torch.ones(1)}, tmp_path / "x.pth")
    assert list(read_layout(tmp_path, allow_pickle=True).names()) == ["module.a", "head.b"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.Q4_K.gguf"], r"found model\.Q4_K\.gguf \(GGUF\)"),
        (["onnx/model.onnx", "onnx/model_q4.onnx"], r"found onnx/model\.onnx \(ONNX\)"),
        (["tf_model.h5", "flax_model.msgpack"], r"found flax_model\.msgpack \(Flax\), tf_model\.h5 \(TensorFlow\)"),
        (["model.tflite"], r"found model\.tflite \(TensorFlow Lite\)"),
        (["weights.npz"], r"found weights\.npz \(NumPy, as of MLX or JAX\)"),
    ],
)
def test_weights_of_other_formats_alone_are_named_with_what_is_needed(tmp_path, names, said):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{said}: give the checkpoint that it was exported from"):
        read_layout(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "pytorch_model.bin", "model.pth"])
def test_a_weight_file_that_is_a_link_to_nothing_is_named(tmp_path, name):
    (tmp_path / name).symlink_to("/nowhere/file")
    with pytest.raises(CheckpointError, match=rf"{name}:? is a link to /nowhere/file, which is not there"):
        read_layout(tmp_path, allow_pickle=True)


def test_an_adapter_is_not_taken_for_the_model(tmp_path):
    write_tensors(tmp_path / "adapter.fra.safetensors", {"x": torch.ones(1)})
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    assert list(read_layout(tmp_path, allow_pickle=True).names()) == ["a", "b"]
