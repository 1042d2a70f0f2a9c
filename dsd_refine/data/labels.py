"""Labels go by name: one map from the data's labels to the model's classes, for every split, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np

from dsd_refine.data import imagenet
from dsd_refine.data.tables import Table
from dsd_refine.errors import DataError


@dataclass(frozen=True)
class LabelMap:
    """`ids` maps a data label (text) to a class of the model; `model` are the model's class names in order."""

    model: tuple[str, ...]
    data: tuple[str, ...]
    rule: str
    ids: dict[str, int]


def match_labels(
    aliases: Sequence[Sequence[str]] | None, classes: int, found: set[str], declared: Sequence[str] | None = None
) -> LabelMap:
    """Map the labels found in all splits together.

    `aliases` are the names of each class of the model (the first one is shown), None for a model without names;
    `declared` are the data set's own class names in id order, where it has them: integers that are no names are its ids.

    Raises:
        DataError: names that do not match (both lists), unequal class counts, ids out of range.
    """
    own = list(declared or ())
    named = {_plain(name) for names in aliases or () for name in names} | {_plain(name) for name in own}
    numbers = {text for text in found if _are_integers([text]) and _plain(text) not in named}
    if _are_integers(own):  # names and numbers are the same
        numbers = set()
    said = {text: own[int(text)] for text in numbers if 0 <= int(text) < len(own)}
    matched = _matched(aliases, classes, found - set(said) | set(said.values()), declared)
    return replace(matched, ids=matched.ids | {text: matched.ids[name] for text, name in said.items()})


def _matched(
    aliases: Sequence[Sequence[str]] | None, classes: int, found: set[str], declared: Sequence[str] | None
) -> LabelMap:
    if aliases is not None:
        shown = tuple(names[0] for names in aliases)
        return _by_name(shown, _with_imagenet(aliases, found | set(declared or ())), found)
    integers = declared is not None and _are_integers(declared)
    unknown = sorted(text for text in found - set(declared or found) if not (integers and _are_integers([text])))
    if declared is not None and unknown:
        raise DataError(
            f"labels of the data that are no class names of the training data: {_some(unknown)}. "
            f"The training data's classes are: {_some(declared)}. Rename the labels to these"
        )
    if declared is not None and not integers:
        return _in_order(list(declared), classes, "the data set's own class ids (the model has no names)")
    if _are_integers(found):
        return _as_ids(found | set(declared or ()), classes)
    return _in_order(sorted(found), classes, "sorted order of the data's names (the model has no names)")


def _with_imagenet(aliases: Sequence[Sequence[str]], spoken: set[str]) -> Sequence[Sequence[str]]:
    """The names of each class, and where they are ImageNet-1k's 1000 the other names of these too.

    Two classes are a "crane": in the Hub's data the first (the other is "crane2" there), in torchvision the second (the
    first is "crane bird" there). Which is meant is known where the data, that have the names `spoken`, have that companion.
    """
    if len(aliases) != 1000:
        return aliases
    from timm.data import ImageNetInfo

    info, bird, machine = ImageNetInfo("imagenet-1k"), 134, 517
    known = []
    for number in range(1000):
        text = str(info.index_to_description(number))
        known.append({str(info.index_to_label_name(number)), text, text.partition(", ")[0]})
    known[bird].add("crane bird")
    known[machine].add("crane2")
    known[639] = known[639] - {"maillot"} | {"maillot tank suit"}  # class 638 is the maillot
    if not all(
        {_plain(name) for name in own} & {_plain(name) for name in more} for own, more in zip(aliases, known, strict=True)
    ):
        return aliases
    names = [{*own, *more} for own, more in zip(aliases, known, strict=True)]
    if ("crane2" in spoken) != ("crane bird" in spoken):
        names[machine if "crane2" in spoken else bird].discard("crane")
    return [sorted(each) for each in names]


def _by_name(shown: tuple[str, ...], aliases: Sequence[Sequence[str]], found: set[str]) -> LabelMap:
    exact, plain = _owners(aliases, str), _owners(aliases, _plain)
    # as written first: "cardigan" is no "Cardigan", but "Tabby_Cat" may be the "tabby cat"
    owners = {text: exact.get(text) or plain.get(_plain(text)) or set() for text in found}
    unknown = sorted(text for text in found if len(owners[text]) != 1)
    if unknown:
        fault = (
            "no class names of the model" if not all(owners[text] for text in unknown) else "names of several of its classes"
        )
        raise DataError(
            f"labels of the data that are {fault}: {_some(unknown)}. "
            f"The model's classes are: {_some(shown)}. Rename the folders or labels to the model's names"
            + (", or say the integers' names in order: --set 'label_names=[…]' (imagenet-1k)" if _are_integers(unknown) else "")
        )
    mapping = {text: next(iter(owners[text])) for text in sorted(found)}
    if len(set(mapping.values())) < len(mapping):
        raise DataError(f"two labels of the data mean the same class of the model: {_some(sorted(found))}")
    return LabelMap(shown, tuple(mapping), "by name", mapping)


def _owners(aliases: Sequence[Sequence[str]], form: Callable[[str], str]) -> dict[str, set[int]]:
    """The classes that have each name, in this form."""
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(aliases):
        for name in names:
            owners.setdefault(form(name), set()).add(number)
    return owners


def _are_integers(names: Iterable[str]) -> bool:
    return all(re.fullmatch("-?[0-9]+", name) for name in names)


def _as_ids(found: set[str], classes: int) -> LabelMap:
    numbers = sorted({int(text) for text in found})
    if numbers[0] < 0 or numbers[-1] >= classes:
        raise DataError(f"class ids in the data run from {numbers[0]} to {numbers[-1]}, the model has 0 to {classes - 1}")
    if len(numbers) != classes:
        raise DataError(f"the data has {len(numbers)} classes, the model {classes}, and no names to tell which are which")
    mapping = {str(n): n for n in numbers} | {text: int(text) for text in found}
    return LabelMap(tuple(map(str, range(classes))), tuple(map(str, numbers)), "the data's integers are the class ids", mapping)


def _in_order(names: list[str], classes: int, rule: str) -> LabelMap:
    if len(names) != classes:
        raise DataError(
            f"the data has {len(names)} classes ({_some(names)}), the model {classes}; the head is never re-made to fit"
        )
    return LabelMap(tuple(names), tuple(names), rule, {name: i for i, name in enumerate(names)})


def _plain(name: str) -> str:
    name = re.sub("^0+(?=[0-9]+$)", "", name)  # a table's reader takes 01 for 1
    return " ".join(name.replace("_", " ").casefold().split())


def _some(names: Sequence[str], most: int = 12) -> str:
    rest = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def label_texts(table: Table, name: str) -> list[str | None]:
    """The label column as texts; None where a row has no label. Integers are their names, where those are known.

    Raises:
        DataError: several labels a row, numbers that are no classes, a class id out of range or of another class than the
            row's file name says.
    """
    kind, values = table.rows.features[name], table.rows.with_format(None)[name]
    if isinstance(kind, datasets.ClassLabel):
        return [_class_name(kind.names, table, row, value) for row, value in enumerate(values)]
    texts: list[str | None] = []
    known: dict[str, str] = {}  # each name once: there are few, and many rows
    for row, value in enumerate(values):
        if isinstance(value, list | dict | np.ndarray):
            raise DataError(
                f"row {table.name(row)}: {name!r} holds several labels ({value!r:.60}); multi-label is not supported"
            )
        if isinstance(value, float) and value == value and not value.is_integer():
            raise DataError(f"row {table.name(row)}: the label {value} is no class; regression is not supported")
        missing = value is None or value != value or value == ""
        text = str(int(value)) if isinstance(value, float) and not missing else str(value)
        texts.append(None if missing else known.setdefault(text, text))
    return texts if table.classes is None else _with_names(table, table.classes, texts)


def _class_name(names: Sequence[str], table: Table, row: int, value: int | None) -> str | None:
    if value is None or value == -1:  # -1 is how data sets hide the labels of a test split
        return None
    if not 0 <= value < len(names):
        raise DataError(f"row {table.name(row)}: class id {value} is outside 0..{len(names) - 1}")
    return str(names[value])


def _with_names(table: Table, names: tuple[str, ...], texts: list[str | None]) -> list[str | None]:
    """Integers as the names that they are said to be, held against the rows' own file names where these say a class."""
    found = [
        _class_name(names, table, row, int(text)) if text is not None and re.fullmatch("-?[0-9]+", text) else text
        for row, text in enumerate(texts)
    ]
    files = imagenet.spoken(table.rows) if names == imagenet.synsets() else ()
    for row, (name, said) in enumerate(zip(found, files, strict=False)):
        if name is not None and said and name not in said:
            raise DataError(
                f"row {table.name(row)}: its label {texts[row]} would be {name}, its file is of {' '.join(sorted(said))}: "
                "these integers are not ImageNet-1k's. Leave out label_names: imagenet-1k, or give the labels as names"
            )
    return found
