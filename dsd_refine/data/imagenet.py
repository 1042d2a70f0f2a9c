"""ImageNet's class numbers: the data sets that use them, their names, and the classes in file
names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import datasets

from dsd_refine.extras import is_installed

# Data sets whose integer labels count the synsets in sorted order, as models do, without a file
# that says so.
NUMBERED = ("timm/imagenet-1k-wds",)
SMALLEST = 1000  # classes of the smallest ImageNet
BACKGROUND = "background"  # the first of 1001 outputs of TensorFlow's models


@cache
def outputs(classes: int) -> tuple[tuple[str, str], ...] | None:
    """Return the WordNet id and the description of each output of a head with so many classes.

    A head with 1001 classes is that of ImageNet-1k with the background before it.

    Returns:
        None if no ImageNet has this number of classes.
    """
    # A text classifier neither has to import timm nor to have it. Image models have it, by `open_library`.
    if classes < SMALLEST or not is_installed("timm"):
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
    """Return the 1000 WordNet ids of ImageNet-1k (`n01440764`, …) in the order of the class
    numbers.
    """
    return tuple(synset for synset, _ in outputs(1000) or ())


@cache
def known_names(classes: int) -> tuple[frozenset[str], ...] | None:
    """Return all names that data sets and models of ImageNet give to each output of a head with so
    many classes.

    Returns:
        None if no ImageNet has this number of classes.
    """
    of_head = outputs(classes)
    if of_head is None:
        return None
    if classes not in (1000, 1001):
        return tuple(frozenset(names) for names in of_head)
    first = classes - 1000
    known = [{synset, text, text.partition(", ")[0]} for synset, text in of_head]
    known[first + BIRD].add("crane bird")
    known[first + MACHINE].add("crane2")
    known[first + 639] = known[first + 639] - {"maillot"} | {"maillot tank suit"}  # class 638 is the maillot
    return tuple(map(frozenset, known))


BIRD, MACHINE = 134, 517  # the two cranes


def other_crane(classes: int, names: set[str]) -> int | None:
    """Return the output that the label "crane" does not mean in data with these `names`; None: not
    known.

    Two classes are called "crane". In the Hub's data it is the first one, and the other is
    "crane2". In torchvision it is the second one, and the first is "crane bird". The name of the
    other one in the data tells which is meant.
    """
    if classes not in (1000, 1001) or ("crane2" in names) == ("crane bird" in names):
        return None
    return classes - 1000 + (MACHINE if "crane2" in names else BIRD)


def synsets_in_file_names(rows: datasets.Dataset) -> Iterator[set[str]]:
    """Yield the WordNet ids in each row's file name, from webdataset's columns (`__key__`, and
    `filename` in `json`).

    Without these columns, it yields nothing.
    """
    columns = [rows[name] for name in ("__key__", "json") if name in rows.column_names]
    for values in zip(*columns, strict=True) if columns else ():
        yield set(re.findall(r"(?<![a-z0-9])n\d{8}(?=[_/])", " ".join(map(str, values))))
