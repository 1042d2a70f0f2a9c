"""What each of two processes does for tests/test_sharded.py: several sharded runs, one after the other, in one launch.

It is started by torchrun with a folder that holds the sources, the data and `arguments.json`: name of a run -> its arguments.
Each run is written to the folder `NAME`. In the run `stopped` one process finds its disk full, and after a resume
it alone gets a signal; this is kept as `left.partial`, and resumed to its end.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn

from dsd_refine import files
from dsd_refine.cli.app import main
from dsd_refine.errors import UsageError
from dsd_refine.masking.layers import Layer
from dsd_refine.masking.masks import make_masks
from dsd_refine.run import rates
from dsd_refine.training import loop as train
from dsd_refine.training.shards import Shards, unique

CPU = torch.device("cpu")
SGD = {"lr": 0.1, "momentum": 0.9, "fused": True}


def command(*args):
    """Run the command in this process, and return its exit code. The next run may have another precision."""
    AcceleratorState._reset_state()
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return ended.value.code


def signal_one(patch, steps):
    """Send a signal to the second process alone, once so many steps were made."""
    made, step = [0], train.train_step

    def counted(*args):
        made[0] += 1
        if made[0] == steps and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    patch.setattr(train, "train_step", counted)


def fill_disk_of_one(patch):
    """Let the second process find no room when it syncs its second file."""
    synced, sync = [0], files.sync

    def full(file):
        synced[0] += 1
        if synced[0] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    if os.environ["RANK"] == "1":
        patch.setattr(files, "sync", full)


class Block(nn.Module):
    """A block whose tensors have odd sizes: the second has fewer rows than there are processes."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(5, 7), nn.Linear(7, 1)

    def forward(self, x):
        """Return a tensor of the shape of `x`."""
        return x + self.narrow(self.wide(x).tanh())


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        """Return three numbers for each row."""
        return self.head(self.blocks(x))


def net():
    """Return the model, equal in every process. One layer holds only values of two magnitudes, so its mask is one of ties."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        weight = model.blocks[0].wide.weight.reshape(-1)
        weight.copy_(0.25 * (1 + torch.arange(35) % 2) * (-1) ** (torch.arange(35) // 3))
    return model


def check_masks():
    """The rows of a mask are those of the mask of the whole layer, ties and random masks included."""
    whole, shards = net(), Shards(net(), CPU)
    parameters = dict(whole.named_parameters())
    layers = [Layer.of_parameter(name, parameter) for name, parameter in parameters.items() if parameter.ndim > 1]
    for criterion in ("magnitude", "random"):
        expected = make_masks(layers, parameters, 0.3, criterion, (1, "mask"))
        found = shards.make_masks(layers, shards.parameters, 0.3, criterion, (1, "mask"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], shards.cut(name, mask)) for name, mask in expected.items())
        zeros = shards.summed({name: int((~mask).sum()) for name, mask in found.items()})
        assert zeros == {layer.name: layer.masked(0.3) for layer in layers}
    read = shards.whole(shards.parameters)
    assert all(torch.equal(read[name], parameter) for name, parameter in parameters.items())


def check_step():
    """One clipped step on the rows of each process is the step of one process on all of them."""
    whole, model = net(), net()
    shards, rank = Shards(model, CPU), dist.get_rank()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    own = unique(shards.parameters)
    one, two = torch.optim.SGD(whole.parameters(), **SGD), torch.optim.SGD(own, **SGD)
    whole(x).square().mean().backward()
    nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    one.step()
    model(x[4 * rank : 4 * rank + 4]).square().mean().backward()
    shards.take_gradients()
    shards.clip(0.1)
    two.step()
    read = shards.whole(shards.parameters)
    assert all(torch.allclose(read[name], p, rtol=0, atol=1e-6) for name, p in whole.named_parameters())


def check_refusals():
    """What FSDP2 cannot divide is refused with its name."""
    shared = net()
    shared.blocks[1].wide.weight = shared.blocks[0].wide.weight
    with pytest.raises(UsageError, match=r"blocks\.1\.wide\.weight is shared by two blocks"):
        Shards(shared, CPU)
    with pytest.raises(UsageError, match="repeats no blocks"):
        Shards(nn.Linear(3, 3), CPU)
    scalar = net()
    scalar.blocks[0].scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UsageError, match="FSDP2 cannot divide"):
        Shards(scalar, CPU)


def check_other_files(folder, arguments):
    """Processes that see other files refuse to begin, all of them."""
    other = folder / ("gpt2" if dist.get_rank() else "llama-source")
    assert command(other, *arguments["llama"][1:], "-o", folder / "other", "--shard") == 2
    dist.barrier()
    assert not (folder / "other.partial").exists()


def die_in_the_middle(folder, arguments):
    """The second process of a run is killed, as by a lack of memory."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            step, made = train.train_step, [0]

            def killed(*args):
                made[0] += 1
                if made[0] == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*args)

            patch.setattr(train, "train_step", killed)
        command(*arguments["killed"], "-o", folder / "killed", "--shard", "--save-every", 0)


def runs(folder, arguments):
    """Make the runs of `arguments.json`. The run `killed` was begun by another launch."""
    for name, args in arguments.items():
        args = [*args, "-o", folder / name, "--shard", *(["--resume"] if name == "killed" else [])]
        if name == "stopped":
            with pytest.MonkeyPatch.context() as patch:
                fill_disk_of_one(patch)
                assert command(*args, "--save-every", 0) == 5
            assert not (folder / name).exists()
            args.append("--resume")
            with pytest.MonkeyPatch.context() as patch:
                signal_one(patch, 3)
                assert command(*args, "--save-every", 0) == 4
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.copytree(folder / "stopped.partial", folder / "left.partial")
            dist.barrier()
        assert command(*args) == 0, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    if sys.argv[2:] == ["die"]:
        die_in_the_middle(folder, arguments)
        sys.exit(1)  # the other one has lost its partner
    rates.STEPS, rates.SHORTEST_RUN = 8, 1
    runs(folder, arguments)
    check_other_files(folder, arguments)
    check_masks()
    check_step()
    check_refusals()
    sys.stderr.write(f"process {os.environ['RANK']} is done\n")
    dist.destroy_process_group()
