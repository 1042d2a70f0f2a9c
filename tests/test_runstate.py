"""OUT.partial: what is saved comes back as it was, one run at a time, and nothing of the user's is removed."""

import json
import os

import pytest
import torch
from torch import nn

from dsd_refine.errors import RunError, UsageError
from dsd_refine.files import replace_bytes
from dsd_refine.run.workspace import Workspace
from dsd_refine.training.packing import pack_masks, pack_optimizer, unpack_masks, unpack_optimizer


@pytest.fixture
def workspace(tmp_path):
    place = Workspace(tmp_path / "out")
    place.partial.mkdir()
    place.log_file.touch()
    return place


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4, 5)])
def test_masks_are_packed_to_bits_and_back(shape):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.zeros(shape)
    if len(shape) == 4:
        parameter = parameter.to(memory_format=torch.channels_last)
    mask = torch.empty_like(parameter, dtype=torch.bool).copy_(torch.rand(shape, generator=generator) > 0.5)
    packed = pack_masks({"w": mask})
    assert packed["mask.w"].numel() == -(-mask.numel() // 8)
    back = unpack_masks(packed, {"w": parameter})["w"]
    assert torch.equal(back, mask)
    assert back.stride() == parameter.stride()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_goes_on_as_if_it_had_not_been_saved(kind, workspace):
    def made():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        with_momentum = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": torch.optim.AdamW}[kind]
        return model, with_momentum(model.parameters())

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer)
    workspace.write_tensors("x.safetensors", pack_optimizer(optimizer))
    other, taken_up = made()
    other.load_state_dict(model.state_dict())
    unpack_optimizer(workspace.read_tensors("x.safetensors"), taken_up)
    step(model, optimizer)
    step(other, taken_up)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_save_replaces_the_one_before_and_is_whole(workspace):
    for number in (1, 2):
        workspace.save({"w": torch.full((3,), float(number))})
        state = json.loads((workspace.partial / "state.json").read_text())
        assert workspace.read_tensors(state["tensors"])["w"].tolist() == [number] * 3
    assert len(list(workspace.partial.glob("state-*.safetensors"))) == 1
    assert not list(workspace.partial.glob("*.tmp"))


def test_nothing_in_the_state_is_a_pickle(workspace):
    workspace.save({"w": torch.zeros(3)})
    for path in workspace.partial.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK")), path.name


def test_a_save_that_fails_leaves_the_last_good_one(workspace, monkeypatch):
    workspace.save({"w": torch.ones(3)})
    good = {path.name: path.read_bytes() for path in workspace.partial.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left"):
        workspace.save({"w": torch.zeros(3)})
    assert {path.name: path.read_bytes() for path in workspace.partial.iterdir()} == good


def test_bytes_that_cannot_be_written_leave_no_trace(tmp_path):
    with pytest.raises(RunError, match="cannot write"):
        replace_bytes(tmp_path / "absent" / "file", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_told_the_first_s_process(workspace):
    with workspace.locked(), pytest.raises(UsageError, match=rf"process {os.getpid()}\)"), workspace.locked():
        pass
    with workspace.locked():  # given back
        pass


def test_the_lock_of_a_dead_process_does_not_block(workspace):
    (workspace.partial / "lock").touch()
    (workspace.partial / "pid").write_text("999999999\n")
    with workspace.locked():
        assert (workspace.partial / "pid").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        ({"out/x": "theirs"}, {}, "is not empty"),
        ({"out/x": "theirs"}, {"overwrite": True}, "no report of dsd-refine"),
        ({"out": "a file"}, {}, "is a file"),
        ({"out": "a file"}, {"overwrite": True}, "is a file"),
        ({"out.partial/state.json": "{}"}, {}, "unfinished run"),
    ],
)
def test_a_target_that_holds_something_is_refused(tmp_path, made, options, says):
    for name, text in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says):
        Workspace(tmp_path / "out").check_target(tmp_path / "source", **{"resume": False, "overwrite": False, **options})
    assert {name: (tmp_path / name).read_text() for name in made} == made


@pytest.mark.parametrize("out", ["source", "source/out", "."])
def test_a_target_over_the_source_is_refused(tmp_path, out):
    (tmp_path / "source").mkdir()
    with pytest.raises(UsageError, match="in or over the source"):
        Workspace(tmp_path / out).check_target(tmp_path / "source", resume=False, overwrite=True)


def test_publishing_replaces_only_a_finished_run_of_ours(tmp_path):
    out = tmp_path / "out"
    (out / "dsd").mkdir(parents=True)
    (out / "dsd/report.json").write_text(json.dumps(dict.fromkeys(("schema", "verdict", "output", "source", "arms"))))
    workspace = Workspace(out)
    workspace.check_target(tmp_path / "source", resume=False, overwrite=True)
    (workspace.ready / "dsd").mkdir(parents=True)
    (workspace.ready / "dsd/report.json").write_text("new")
    workspace.publish()
    assert (out / "dsd/report.json").read_text() == "new"
    assert not workspace.partial.exists()


def test_a_file_named_like_our_report_makes_nothing_ours(tmp_path):
    (tmp_path / "out/dsd").mkdir(parents=True)
    (tmp_path / "out/dsd/report.json").write_text("{}")
    (tmp_path / "out/thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="no report of dsd-refine"):
        Workspace(tmp_path / "out").check_target(tmp_path / "source", resume=False, overwrite=True)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
def test_a_partial_that_is_not_ours_is_not_touched(tmp_path, options):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("years")
    with pytest.raises(UsageError, match=r"'thesis.txt', which is not from dsd-refine"):
        Workspace(tmp_path / "out").check_target(tmp_path / "source", **{"resume": False, "overwrite": False, **options})
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "years"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "scalar", "empty"])
def test_tensors_of_any_kind_come_back_as_they_were(workspace, layout):
    """Also where odd numbers of bytes stand among wider elements."""
    values = torch.randn(3, 5, 2, 7, generator=torch.Generator().manual_seed(0))
    shaped = {
        "contiguous": values,
        "channels_last": values.to(memory_format=torch.channels_last),
        "transposed": values.transpose(0, 3),
        "scalar": values[0, 0, 0, 0],
        "empty": values[:0],
    }[layout]
    tensors = {
        "bits": (shaped > 0).flatten()[:3].to(torch.uint8), "float": shaped, "half": shaped.to(torch.bfloat16),
        "flags": shaped > 0, "wide": shaped.double(), "count": torch.tensor(5), "alias": shaped,
    }  # fmt: skip
    workspace.write_tensors("x.safetensors", tensors)
    back = workspace.read_tensors("x.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name


def test_what_is_saved_is_written_tensor_by_tensor(workspace):
    """Sixteen tensors in one copy would be sixteen times one."""
    import tracemalloc

    import numpy as np

    class Counted(torch.Tensor):
        """On a device, as it were: to be written it is copied."""

        def to(self, *args, **kwargs):
            return torch.from_numpy(np.ones(len(self), np.float32))

    tensors = {f"w{n}": torch.zeros(100_000).as_subclass(Counted) for n in range(16)}
    tracemalloc.start()
    workspace.write_tensors("x.safetensors", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 400_000
    assert all(value.eq(1).all() for value in workspace.read_tensors("x.safetensors").values())
