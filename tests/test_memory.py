"""What `plan` says of memory is what a run holds: counted in tensors, not in pages of the process."""

import gc

import builders
import pytest
import torch
from conftest import SHORT

from dsd_refine.checkpoint.checkpoint import open_shapes
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.masking.checkpoint_layers import open_layers
from dsd_refine.planning.plan import memory_of
from dsd_refine.recipe import read_recipe, validate
from dsd_refine.run.workspace import Workspace

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
RUN = ("--control", "none", "--quiet", "--lr", "0.001", "--warmup-steps", "0", "--holdout", "0.3")


@pytest.fixture
def only_what_comes():
    """What is there before is left out of the search through all objects, which takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def held():
    """Bytes of all storages that tensors stand on, each once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def planned(source, file):
    """Bytes that `plan` counts for the largest phase of a recipe."""
    found = find_source(str(source))
    checkpoint = open_shapes(found, open_library(found))
    recipe = validate(read_recipe(file), file.name)
    layers = open_layers(checkpoint, recipe, [])
    return max(memory_of(checkpoint, layers, recipe, phase, last=phase is recipe.phases[-1]) for phase in recipe.phases)


@pytest.mark.usefixtures("only_what_comes")
@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "sgd", "--momentum", "0"),
        ("--optimizer", "sgd", "--momentum", "0.9"),
        ("--optimizer", "adamw"),
        ("--optimizer", "adamw", "--set", "phases.0.distill={weight: 0.5}"),
        ("--optimizer", "sgd", "--set", "phases.1.average=ema", "--keep", "last"),
        ("--optimizer", "sgd", "--set", "phases.0.frozen=['*layer.0*']", "--set", "phases.1.frozen=['*layer.0*']"),
    ],
)
def test_memory_said_by_plan_is_what_the_steps_hold(command, made, tmp_path, monkeypatch, options):
    source = builders.bert_checkpoint(tmp_path / "model", **WIDE)
    args = [source, "--data", made / "texts.csv", *SHORT, *RUN, *options]
    before, most, log = held(), [0], Workspace.log

    def watched(self, line):  # at a step's end gradients, optimizer state and masks are all there
        if line["event"] == "step":
            most[0] = max(most[0], held() - before)
        return log(self, line)

    monkeypatch.setattr(Workspace, "log", watched)
    assert command(*args, "-o", tmp_path / "out").code == 0
    assert most[0] == pytest.approx(planned(source, tmp_path / "out/dsd/recipe.yaml"), rel=0.1)
