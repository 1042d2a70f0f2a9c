"""Preprocessing is the checkpoint's: its test size for evaluation, its input size for training (rule 10)."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torchvision.models import get_model_weights
from torchvision.transforms import InterpolationMode, functional

from dsd_refine.checkpoint.libraries.image_processor import _processed
from dsd_refine.checkpoint.libraries.timm import timm_preprocessing
from dsd_refine.checkpoint.libraries.torchvision import preset_preprocessing
from dsd_refine.checkpoint.preprocessing import Preprocessing, image_of, levels_of
from dsd_refine.checkpoint.torchvision_release import describe
from dsd_refine.tasks.inputs.pixels import cropped


def test_evaluation_has_the_test_size_and_training_the_input_size():
    sizes = {"input_size": (3, 32, 32), "test_input_size": (3, 48, 48)}
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=sizes)
    found, picture = timm_preprocessing(model), Image.new("RGB", (64, 64))
    assert found.evaluation(picture).shape == (3, 48, 48)
    assert found.training(picture).shape == (3, 32, 32)
    assert found.size == (32, 32)
    assert found.shown["evaluation"]["input_size"] == [3, 48, 48]
    assert found.shown["training"]["input_size"] == [3, 32, 32]


def test_each_level_has_its_number_and_a_picture_comes_back_to_the_bit():
    """What is held of a prepared picture are bytes; the pixels made of them are the library's own."""
    for found in (of_timm(3), of_timm(1), of_torchvision(), *(of_transformers(name) for name in PROCESSORS)):
        picture = Image.effect_noise((90, 70), 64).convert("L" if found.channels == 1 else "RGB")
        prepared = found.evaluation(picture)
        levels = found.levels.of(prepared)
        assert levels.dtype == np.uint8
        assert found.levels.pixels(levels).equal(prepared)
        assert found.normalise(image_of(levels)).equal(found.levels.pixels(levels))


@pytest.mark.parametrize("change", [lambda x: x + 0.001, lambda x: x.double(), lambda x: x.flip(0) * 1.01])
def test_pixels_that_no_level_becomes_are_not_held(change):
    found = of_timm(3)
    assert found.levels.of(change(found.evaluation(Image.effect_noise((90, 70), 64).convert("RGB")))) is None


@pytest.mark.parametrize(
    "normalise",
    [
        lambda image: to_floats(image).flip(0),  # channels in another order
        lambda image: to_floats(image) - to_floats(image).mean(),  # depends on the other pixels
        lambda image: to_floats(image).flip(2),  # moves pixels
        lambda image: to_floats(image).neg(),  # falls
        lambda image: to_floats(image)[:, :8],
        lambda image: to_floats(image).double(),
    ],
)
def test_what_is_no_number_for_each_level_has_no_levels(normalise):
    assert levels_of(to_floats, 3) is not None
    assert levels_of(normalise, 3) is None


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("place", [(0, 0, 70, 90), (5, 11, 40, 33), (60, 2, 3, 5)])
def test_a_part_is_resized_as_pillow_does(name, place):
    """torch rounds bytes otherwise than Pillow: a level may differ by one, bicubic by two."""
    levels = np.asarray(Image.effect_noise((90, 70), 64).convert("RGB")).copy()
    found = replace(of_timm(3), interpolation=InterpolationMode(name))
    wanted = functional.resized_crop(Image.fromarray(levels), *place, found.size, found.interpolation)
    off = cropped(levels, place, found).astype(int) - np.asarray(wanted).transpose(2, 0, 1)
    assert np.abs(off).max() <= {"bilinear": 1, "bicubic": 2}.get(name, 0)


def to_floats(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def of_timm(channels):
    return timm_preprocessing(timm.create_model("test_resnet", in_chans=channels, num_classes=3))


def of_torchvision():
    weights = get_model_weights("resnet18").IMAGENET1K_V1
    return preset_preprocessing(describe("resnet18", weights)["preprocessing"])


PROCESSORS = ("ViTImageProcessor", "ConvNextImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "BlipImageProcessor")


def of_transformers(name):
    processor = getattr(transformers, name)()
    partial_of = partial(_processed, processor)
    normalise = partial(_processed, processor, do_resize=False, do_center_crop=False)
    return Preprocessing(3, partial_of, partial_of, normalise, (224, 224), InterpolationMode.BICUBIC, {})
