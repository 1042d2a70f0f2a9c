"""Many families: docs/layers.md is what the code says, each comes back byte by byte, each is masked to the count."""

import families
import pytest
import torch
from families import FAMILIES, TABLE
from versions import are_tested

from dsd_refine.masking.checkpoint_layers import few_maskable
from dsd_refine.masking.layers import masked_count
from dsd_refine.masking.masks import apply_masks, make_masks

of_these_versions = pytest.mark.skipif(
    not are_tested("timm", "torchvision", "transformers"), reason="docs/layers.md is of the versions in constraints.txt"
)


def documented(title):
    """A section of docs/layers.md as it stands in the file."""
    name = f"transformers: {title}" if title in FAMILIES else title
    return TABLE.read_text(encoding="utf-8").split(f"## {name}\n")[1].split("\n## ")[0].strip().splitlines()


def compared(title, found):
    rows = families.section(title, found).strip().splitlines()[2:]
    assert rows == documented(title), "python tests/support/families.py writes docs/layers.md anew; read the difference first"


@of_these_versions
def test_the_table_names_the_versions_it_is_of():
    assert TABLE.read_text(encoding="utf-8").startswith(families.head())


@of_these_versions
def test_every_test_architecture_of_timm():
    import timm

    compared("timm", families.timm_layers())
    assert all(f"| {name} |" in TABLE.read_text() for name in timm.list_models("test_*"))


@of_these_versions
def test_torchvision():
    compared("torchvision", families.torchvision_layers())


@of_these_versions
@pytest.mark.parametrize("task", list(FAMILIES))
def test_transformers(task, tmp_path):
    """Every family: opened through its files, written back unchanged, masked; and the table."""
    rows = []
    for family, checkpoint, layers in families.opened_families(task):
        rows.append((family, layers))
        folder = tmp_path / family
        folder.mkdir()
        checkpoint.write(checkpoint.model, folder)
        for file in checkpoint.layout.files:
            assert (folder / file.name).read_bytes() == file.path.read_bytes(), family
        check_counts(family, checkpoint, layers)
    compared(task, rows)


def check_counts(family, checkpoint, layers):
    """Masked to 30 %, each tensor of the file has exactly round(0.3 n) zeros more where it had none, expert by expert."""
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    apply_masks(make_masks(layers, parameters, 0.3), parameters)
    state = checkpoint.model.state_dict()
    for layer in layers:
        before = checkpoint.layout.tensor(layer.name)
        after = written(checkpoint, layer.name, state)
        if layer.excluded:
            assert torch.equal(before, after) or layer.excluded.startswith("the same storage"), (family, layer.name)
            continue
        for was, now in zip(before.reshape(layer.groups, -1), after.reshape(layer.groups, -1), strict=True):
            wanted, zeros = masked_count(was.numel(), 0.3), int((was == 0).sum())
            assert int((now == 0).sum()) == max(wanted, zeros), (family, layer.name)


def written(checkpoint, name, state):
    from dsd_refine.checkpoint.placement import gather

    return gather(checkpoint.placement[name], checkpoint.layout.tensor(name), state)


def test_there_are_enough_of_them():
    assert len({family for names in FAMILIES.values() for family in names}) >= 75


def test_a_model_that_masks_hardly_reach_is_warned_of():
    import timm

    with torch.device("meta"):
        model = timm.create_model("nf_resnet26")
    (warning,) = few_maskable(families.of_shapes(model))
    assert "only 12.8% of the weights" in warning
    assert "reparametrised weight" in warning
    with torch.device("meta"):
        assert few_maskable(families.of_shapes(timm.create_model("test_nfnet"))) == []
