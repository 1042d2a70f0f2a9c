"""ImageNet's class numbers: which data sets speak in them, and what a row's own file name says of its class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import datasets

# `cls` counts the synsets in sorted order there, as the models do, and no file of the data set says so
NUMBERED = ("timm/imagenet-1k-wds",)
SMALLEST = 1000  # classes of the smallest ImageNet
BACKGROUND = "background"  # the first of 1001 outputs, as TensorFlow's models have them


@cache
def outputs(classes: int) -> tuple[tuple[str, str], ...] | None:
    """(WordNet id, description) of each output of a head with so many classes; None where no ImageNet has that size.

    A head of 1001 is ImageNet-1k's with the background before it: the classes are moved up by one.
    """
    if classes < SMALLEST:  # a text classifier's head asks too, and has no need of timm
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if classes == 1001:
        return ((BACKGROUND, BACKGROUND), *(outputs(1000) or ()))
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return tuple((str(info.index_to_label_name(i)), str(info.index_to_description(i))) for i in range(classes))


@cache
def synsets() -> tuple[str, ...]:
    """The 1000 WordNet ids (`n01440764`, …) in the order of the class numbers."""
    return tuple(synset for synset, _ in outputs(1000) or ())


@cache
def known_names(classes: int) -> tuple[frozenset[str], ...] | None:
    """All names that the data sets and models of ImageNet give each output of a head of this size; None as `outputs`."""
    found = outputs(classes)
    if found is None:
        return None
    if classes not in (1000, 1001):
        return tuple(frozenset(names) for names in found)
    first = classes - 1000
    known = [{synset, text, text.partition(", ")[0]} for synset, text in found]
    known[first + BIRD].add("crane bird")
    known[first + MACHINE].add("crane2")
    known[first + 639] = known[first + 639] - {"maillot"} | {"maillot tank suit"}  # class 638 is the maillot
    return tuple(map(frozenset, known))


BIRD, MACHINE = 134, 517  # the two cranes


def other_crane(classes: int, spoken: set[str]) -> int | None:
    """The output that is not meant by a bare "crane" in data with the names `spoken`; None where that is not known.

    Two classes are a "crane": in the Hub's data the first (the other is "crane2" there), in torchvision the second (the
    first is "crane bird" there). Which is meant is known where the data have that companion.
    """
    if classes not in (1000, 1001) or ("crane2" in spoken) == ("crane bird" in spoken):
        return None
    return classes - 1000 + (MACHINE if "crane2" in spoken else BIRD)


def spoken(rows: datasets.Dataset) -> Iterator[set[str]]:
    """The WordNet ids in each row's file name, where it is in webdataset's columns (`__key__`, `json` with a `filename`)."""
    held = [rows[name] for name in ("__key__", "json") if name in rows.column_names]
    for said in zip(*held, strict=True) if held else ():
        yield set(re.findall(r"(?<![a-z0-9])n\d{8}(?=[_/])", " ".join(map(str, said))))
