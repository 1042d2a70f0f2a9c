"""A source that its own library cannot load as any user would is refused before the first step."""

import pytest
import torch
from builders import copy_folder
from conftest import SHORT

DATA = {"vit": "colours", "bert": "texts.csv", "gpt2": "documents.txt"}


@pytest.mark.parametrize("model", ["bert", "gpt2", "vit"])  # timm reads the one file that there is
def test_weights_under_a_name_that_the_library_does_not_read(refused, made, tmp_path, model):
    source, out = copy_folder(made / model, tmp_path / "model"), tmp_path / "out"
    (source / "model.safetensors").rename(source / "weights.safetensors")
    said = refused(source, "--data", made / DATA[model], "-o", out, *SHORT)
    assert "weights.safetensors" in said
    assert str(source) in said
    assert not out.exists()


def test_a_pickle_beside_is_not_loaded_in_their_place(refused, made, tmp_path):
    source = copy_folder(made / "bert", tmp_path / "model")
    (source / "model.safetensors").rename(source / "weights.safetensors")

    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "mark"), "w")

    torch.save({"x": Opens()}, source / "pytorch_model.bin")
    refused(source, "--data", made / "texts.csv", "-o", tmp_path / "out", *SHORT)
    assert not (tmp_path / "mark").exists()
