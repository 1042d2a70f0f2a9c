"""What it takes to make one picture ready for the model: `python benchmarks/pictures.py [--quick] [--rounds N]`.

Milliseconds a picture on one thread, from JPEG files of 512 px to 128 px: as evaluation sees it, read from the file, or held
whole, or held prepared; and a random part of it, resized by Pillow or by torch. Interleaved, in one process.
"""

from __future__ import annotations

import io
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from common import arguments, each_in_a_place, interleaved, ratio, table
from made import pictures
from PIL import Image
from torchvision.transforms import functional

from dsd_refine.checkpoint.libraries.timm import timm_preprocessing
from dsd_refine.checkpoint.preprocessing import Preprocessing, image_of
from dsd_refine.recipe import Augment
from dsd_refine.tasks.inputs.pixels import augmented, crop_place

SIZE, AUGMENT = 128, Augment(crop="random-resized", flip=0.5)


def ways(preparing: Preprocessing, raws: list[bytes]) -> dict[str, Any]:
    """What is done to the next of the pictures: name -> a function without arguments."""
    images = [Image.open(io.BytesIO(raw)).convert("RGB") for raw in raws]
    wholes = [np.array(image) for image in images]
    levels = preparing.levels
    assert levels is not None
    prepared = [levels.of(preparing.evaluation(image)) for image in images]
    seeds = cycle(range(1000))

    def by_pillow(whole: np.ndarray[Any, Any]) -> torch.Tensor:
        place = crop_place(*whole.shape[:2], AUGMENT, torch.Generator().manual_seed(next(seeds)))
        image = image_of(whole.transpose(2, 0, 1))
        return preparing.normalise(functional.resized_crop(image, *place, preparing.size, preparing.interpolation))

    each = {
        "whole picture: read and decoded": (raws, lambda raw: preparing.evaluation(Image.open(io.BytesIO(raw)).convert("RGB"))),
        "whole picture: held whole": (wholes, lambda whole: preparing.evaluation(image_of(whole.transpose(2, 0, 1)))),
        "whole picture: held prepared": (prepared, levels.pixels),
        "random part: resized by Pillow": (wholes, by_pillow),
        "random part: resized by torch": (wholes, lambda whole: augmented(whole, preparing, AUGMENT, next(seeds))),
    }
    return {name: partial(all_of, given, does) for name, (given, does) in each.items()}


def all_of(given: list[Any], does: Any) -> None:
    for one in given:
        does(one)


def shown(given: Any, folder: Path) -> None:
    """The table."""
    torch.set_num_threads(1)
    rows = 8 if given.quick else 40
    pictures(folder, rows, 512)
    raws = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    overlay = {"input_size": (3, SIZE, SIZE), "test_input_size": (3, SIZE, SIZE)}
    model = timm.create_model("resnet18", num_classes=10, pretrained_cfg_overlay=overlay)
    seconds = interleaved(ways(timm_preprocessing(model), raws), given.rounds)
    first = "whole picture: read and decoded"
    lines = [[name, f"{1000 * median(all) / rows:.2f}", ratio(seconds, name, first)] for name, all in seconds.items()]
    table(f"JPEG files of 512 px for {SIZE} px", ["", "ms", f"/ {first}"], lines)


def main() -> None:
    each_in_a_place(arguments(__doc__, 9), shown)


if __name__ == "__main__":
    main()
