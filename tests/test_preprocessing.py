"""Preprocessing is the checkpoint's: its test size for evaluation, its input size for training (rule 10)."""

import timm
from PIL import Image

from dsd_refine.checkpoint.libraries.timm import timm_preprocessing


def test_evaluation_has_the_test_size_and_training_the_input_size():
    sizes = {"input_size": (3, 32, 32), "test_input_size": (3, 48, 48)}
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=sizes)
    found, picture = timm_preprocessing(model), Image.new("RGB", (64, 64))
    assert found.evaluation(picture).shape == (3, 48, 48)
    assert found.training(picture).shape == (3, 32, 32)
    assert found.size == (32, 32)
    assert found.shown["evaluation"]["input_size"] == [3, 48, 48]
    assert found.shown["training"]["input_size"] == [3, 32, 32]
