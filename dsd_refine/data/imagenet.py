"""ImageNet-1k's class numbers: which data sets speak in them, and what a row's own file name says of its class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import datasets

# `cls` counts the synsets in sorted order there, as the models do, and no file of the data set says so
NUMBERED = ("timm/imagenet-1k-wds",)


@cache
def synsets() -> tuple[str, ...]:
    """The 1000 WordNet ids (`n01440764`, …) in the order of the class numbers."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(str(info.index_to_label_name(number)) for number in range(1000))


def spoken(rows: datasets.Dataset) -> Iterator[set[str]]:
    """The WordNet ids in each row's file name, where it is in webdataset's columns (`__key__`, `json` with a `filename`)."""
    held = [rows[name] for name in ("__key__", "json") if name in rows.column_names]
    for said in zip(*held, strict=True) if held else ():
        yield set(re.findall(r"(?<![a-z0-9])n\d{8}(?=[_/])", " ".join(map(str, said))))
