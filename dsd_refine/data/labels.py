"""Match labels to classes by name: one map from the data's labels to the model's classes, for all
splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from dsd_refine.data import imagenet
from dsd_refine.data.names import (
    MOST,
    are_integers,
    are_measures,
    by_number,
    composed,
    counterparts,
    hides,
    integer,
    listed,
    looks,
    map_option,
    names_form,
    placeholder,
    plain,
    shown,
)
from dsd_refine.data.reading import Table
from dsd_refine.errors import DataError

Aliases = Sequence[Sequence[str]]  # the names of each class

NO_LABEL = ("-",)  # the label of rows on which the annotators did not agree (SNLI, MNLI)


@dataclass(frozen=True)
class LabelMap:
    """A map from the data's labels to the model's classes.

    Attributes:
        model: The model's class names in order.
        data: The data's labels.
        rule: How labels were matched, for the user.
        ids: The number of the class for each label.
        guessed: Only the order of the data's names or numbers tells which class is which.
        warnings: For the user.
    """

    model: tuple[str, ...]
    data: tuple[str, ...]
    rule: str
    ids: dict[str, int]
    guessed: bool = False
    warnings: tuple[str, ...] = ()


def refuse_one_output(classes: int) -> None:
    """Refuse a head with one output, which has no classes to choose from.

    Raises:
        DataError: It has one output.
    """
    if classes == 1:
        raise DataError(
            "the head has one output, which is supported for texts alone (regression, ranking); a classifier of two classes "
            "has two outputs"
        )


def match_labels(
    aliases: Aliases | None,
    classes: int,
    labels: set[str],
    declared: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
) -> LabelMap:
    """Match the labels of all splits to the model's classes.

    Args:
        aliases: The names of each class of the model, the shown one first. None: it has no names.
        classes: The number of the model's classes.
        labels: The labels of all splits.
        declared: The data set's own class names in the order of their ids, if it has such names.
            Labels that are integers and no names are these ids.
        label_map: The class of some labels, by the user. It comes before every rule.

    Raises:
        DataError: Names do not match, or the numbers of classes differ, or an id is out of range.
            Or `label_map` has a label or a class that does not exist.
    """
    refuse_one_output(classes)
    own = list(declared or ())
    name_of_id = _names_of_ids(aliases, own, labels)
    named = labels - set(name_of_id) | set(name_of_id.values())
    if aliases is None and (label_map or any(placeholder(text) is not None for text in {*named, *own})):
        matched = _match_placeholders(classes, named, own, label_map or {}, name_of_id)
    elif aliases is not None:
        matched = _match_names(aliases, named, own, label_map or {}, name_of_id)
    else:
        matched = _match_without_names(classes, named, declared)
    return replace(matched, ids=matched.ids | {text: matched.ids[name] for text, name in name_of_id.items()})


def _names_of_ids(aliases: Aliases | None, own: list[str], labels: set[str]) -> dict[str, str]:
    """The data set's own class name of each label that is its number, and no name."""
    if are_integers(own):  # names and numbers are the same
        return {}
    names = {plain(name) for of_class in aliases or () for name in of_class} | {plain(name) for name in own}
    numbers = {text: integer(text) for text in labels if plain(text) not in names}
    return {text: own[number] for text, number in numbers.items() if number is not None and 0 <= number < len(own)}


def _match_names(
    aliases: Aliases, labels: set[str], own: Sequence[str], label_map: Mapping[str, str], name_of_id: Mapping[str, str]
) -> LabelMap:
    """Match by the model's names, and by `label_map` where it has a label."""
    all_aliases = _with_imagenet(aliases, labels | set(own))
    names = tuple(of_class[0] for of_class in aliases)
    given = _by_label_map(label_map, all_aliases, names, labels, own, name_of_id)
    return _joined(names, given, _by_name(names, all_aliases, labels - set(given)), "by name")


def _match_placeholders(
    classes: int, labels: set[str], own: Sequence[str], label_map: Mapping[str, str], name_of_id: Mapping[str, str]
) -> LabelMap:
    """Match the labels of a model without names: `LABEL_k` is class k, and with `label_map` k is
    too.
    """
    aliases = [[f"LABEL_{k}", *([str(k)] if label_map else [])] for k in range(classes)]
    names = tuple(of_class[0] for of_class in aliases)
    given = _by_label_map(label_map, aliases, names, labels, own, name_of_id)
    return _joined(names, given, _by_name(names, aliases, labels - set(given)), "LABEL_k is class k (the model has no names)")


def _by_label_map(
    label_map: Mapping[str, str],
    aliases: Aliases,
    names: Sequence[str],
    labels: set[str],
    own: Sequence[str],
    name_of_id: Mapping[str, str],
) -> dict[str, int]:
    """The class of each label that `label_map` has.

    Raises:
        DataError: A key is no label of the data, or a value is no class of the model.
    """
    known = {composed(text): text for text in (*labels, *own)} | {composed(text): name for text, name in name_of_id.items()}
    strange = [key for key in label_map if composed(key) not in known]
    if strange:
        every = sorted(labels | set(own))
        raise DataError(
            f"label_map: {listed(strange, every)} {_are(strange)} no label of the data. The data's labels are: {listed(every)}"
        )
    exact, alike = _owners(aliases, composed), _owners(aliases, plain)
    owners = {
        value: exact.get(composed(value)) or alike.get(plain(value)) or _as_number(value, len(names))
        for value in label_map.values()
    }
    wrong = [value for value in dict.fromkeys(label_map.values()) if len(owners[value]) != 1]
    if wrong:
        fault = "no class" if not all(owners[value] for value in wrong) else "the name of several classes"
        raise DataError(
            f"label_map: {listed(wrong, names)} {_are(wrong)} {fault} of the model. "
            f"The model's classes are: {listed(names, wrong)}; their numbers from 0 to {len(names) - 1} mean them too"
        )
    return {known[composed(key)]: next(iter(owners[value])) for key, value in label_map.items()}


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _as_number(value: str, classes: int) -> set[int]:
    number = integer(value)
    return {number} if number is not None and 0 <= number < classes else set()


def _joined(names: tuple[str, ...], given: Mapping[str, int], matched: Mapping[str, int], rule: str) -> LabelMap:
    """Join the classes by `label_map` and by name.

    Only `label_map` may join several labels to one class.

    Raises:
        DataError: Two labels have one class.
    """
    ids = dict(sorted((dict(matched) | dict(given)).items()))
    members: dict[int, list[str]] = {}
    for label, number in ids.items():
        members.setdefault(number, []).append(label)
    unsaid = {n: labels for n, labels in members.items() if len(labels) - len(set(labels) & set(given)) > 1}
    if unsaid:
        number, labels = next(iter(unsaid.items()))
        pairs = dict.fromkeys(labels, names[number])
        raise DataError(
            f"two labels of the data mean the same class of the model: {' and '.join(shown(labels))} are both "
            f"{shown([names[number]], labels)[0]}. Give them one name, or say that they are one class: {map_option(pairs)}"
        )
    if given:
        moved = ", ".join(f"{label} → {names[n]}" for label, n in list(given.items())[:MOST])
        more = f", … ({len(given)} in all)" if len(given) > MOST else ""
        rule = f"by label_map ({moved}{more})" + (f", the others {rule}" if matched else "")
    return LabelMap(names, tuple(ids), rule, ids)


def _match_without_names(classes: int, labels: set[str], declared: Sequence[str] | None) -> LabelMap:
    """Match the labels of a model without names: by the data's own class ids, or by order.

    The counts must be equal.
    """
    integers = declared is not None and are_integers(declared)
    unknown = sorted(text for text in labels - set(declared or labels) if not (integers and are_integers([text])))
    if declared is not None and unknown:
        raise DataError(
            f"labels of the data that are no class names of the training data: {listed(unknown, declared)}. "
            f"The training data's classes are: {listed(declared, unknown)}. Rename the labels to these"
        )
    if declared is not None and not integers:
        return _in_order(list(declared), classes, "the data set's own class ids (the model has no names)")
    if are_integers(labels):
        return _as_ids(labels | set(declared or ()), classes)
    if are_measures(labels):
        raise DataError(
            f"the labels are numbers and no classes: {listed(sorted(labels))}; scores need a text model with one output"
        )
    return _in_order(sorted(labels, key=composed), classes, "sorted order of the data's names (the model has no names)")


def _with_imagenet(aliases: Aliases, data_names: set[str]) -> Aliases:
    """The names of each class.

    Those of ImageNet get the other names of their classes: synsets and descriptions.
    """
    known = imagenet.known_names(len(aliases))
    if known is None or not all(map(_share_a_name, aliases, known)):
        return aliases
    names = [{*own, *more} for own, more in zip(aliases, known, strict=True)]
    other = imagenet.other_crane(len(aliases), data_names)
    if other is not None:
        names[other].discard("crane")
    return [sorted(of_class) for of_class in names]


def _share_a_name(own: Sequence[str], more: frozenset[str]) -> bool:
    return not more.isdisjoint(own) or not set(map(plain, more)).isdisjoint(map(plain, own))


def _by_name(names: tuple[str, ...], aliases: Aliases, labels: set[str]) -> dict[str, int]:
    """The class of each label by name.

    Raises:
        DataError: A label is the name of no class, or of several.
    """
    exact, alike = _owners(aliases, composed), _owners(aliases, plain)
    # First as written: "cardigan" and "Cardigan" are two classes, but "Tabby_Cat" is the "tabby
    # cat".
    owners = {text: exact.get(composed(text)) or alike.get(plain(text)) or set() for text in labels}
    unknown = sorted(text for text in labels if len(owners[text]) != 1)
    if not unknown:
        return {text: next(iter(owners[text])) for text in labels}
    several = all(owners[text] for text in unknown)
    fault = "names of several of its classes" if several else "no class names of the model"
    taken = {number for numbers in owners.values() if len(numbers) == 1 for number in numbers}
    free = [name for number, name in enumerate(names) if number not in taken]
    raise DataError(
        f"labels of the data that are {fault}: {listed(unknown, names)}. The model's classes are: {listed(names, unknown)}. "
        f"Rename the folders or labels to the model's names{_remedy(unknown, names, free, several)}"
    )


def _remedy(unknown: Sequence[str], names: Sequence[str], free: Sequence[str], several: bool) -> str:
    """The options that help, besides renaming, if labels are no names of the model."""
    options = []
    if are_integers(unknown) and _may_be_named_in_order(unknown, names):
        form = names_form(max(integer(text) or 0 for text in unknown) + 1)
        inner = form if len(names) <= MOST else "--set 'label_names=[…]' (imagenet-1k)"
        options.append(f", or say the integers' names in the order that the data count in: {inner}")
    unmarked = [text for text in unknown if text not in NO_LABEL]
    if unmarked and len(unknown) <= MOST:
        pairs: dict[str, str | None] = dict.fromkeys(unknown, None)
        meant = None if several else by_number(unmarked, names) or counterparts(unmarked, free)
        pairs |= meant or dict.fromkeys(unmarked, "NUMBER" if several else "…")
        options.append(f", or say which class each is: {map_option(pairs)}")
    elif not unmarked:
        options.append(f", or leave out the rows that nobody agreed on: {map_option(dict.fromkeys(unknown))}")
    alike = {looks(name): name for name in free}
    twin = next((text for text in unknown if looks(text) in alike), None)
    if twin is not None:
        options.append(f". {twin!a} looks like {alike[looks(twin)]!a}, but is written with other characters")
    return "".join(options)


def _may_be_named_in_order(numbers: Sequence[str], names: Sequence[str]) -> bool:
    """True if the labels count from 0, and the model's names contain no numbers that tell which is
    which.
    """
    count_from_0 = min(integer(text) or 0 for text in numbers) == 0
    # the number of a synset has more digits
    return count_from_0 and not any(re.search(r"(?<!\d)\d{1,3}(?!\d)", name) for name in names)


def _owners(aliases: Aliases, form: Callable[[str], str]) -> dict[str, set[int]]:
    """The classes that have each name, with names in the given form."""
    owners: dict[str, set[int]] = {}
    for number, names in enumerate(aliases):
        for name in names:
            owners.setdefault(form(name), set()).add(number)
    return owners


def _as_ids(labels: set[str], classes: int) -> LabelMap:
    """Take integer labels as the numbers of the classes.

    Raises:
        DataError: They are not the numbers of all classes.
    """
    ids = {text: int(integer(text) or 0) for text in labels}
    numbers = sorted(set(ids.values()))
    if len(numbers) < len(ids):
        twice = sorted(text for text in ids if list(ids.values()).count(ids[text]) > 1)
        raise DataError(
            f"labels of the data that are the same number: {' and '.join(map(repr, twice[:MOST]))}; write it one way"
        )
    if numbers[0] < 0 or numbers[-1] >= classes:
        shift = map_option({str(n): str(n - 1) for n in numbers})
        from_one = numbers == list(range(1, classes + 1)) and classes <= MOST
        raise DataError(
            f"class ids in the data run from {numbers[0]} to {numbers[-1]}, the model has 0 to {classes - 1}"
            + (f". If they count from 1: {shift}" if from_one else "")
        )
    if len(numbers) != classes:
        raise DataError(
            f"the data has {len(numbers)} classes, the model {classes}, and no names to tell which are which"
            f"{_say_which([str(n) for n in numbers], classes)}"
        )
    mapping = {str(n): n for n in numbers} | ids
    rule = "the data's integers are the class ids"
    return LabelMap(tuple(map(str, range(classes))), tuple(map(str, numbers)), rule, mapping, guessed=True)


def _in_order(names: list[str], classes: int, rule: str) -> LabelMap:
    """Take the first name as class 0, the next as class 1, and so on.

    Raises:
        DataError: There are not as many names as classes, or two names look the same.
    """
    if len(names) != classes:
        raise DataError(
            f"the data has {len(names)} classes ({listed(names)}), the model {classes}; the head is never re-made to fit"
            f"{_say_which(names, classes)}"
        )
    twins = [name for name in names if sum(looks(name) == looks(other) for other in names) > 1]
    if twins and any(hides(name) or composed(name) != name for name in twins):
        raise DataError(
            f"labels of the data that look the same: {listed(twins)}. Give them one name, or say which class of the model "
            f"each is: {map_option(dict.fromkeys(names[:MOST], 'NUMBER'))}"
        )
    return LabelMap(tuple(names), tuple(names), rule, {name: i for i, name in enumerate(names)}, guessed=True)


def _say_which(names: Sequence[str], classes: int) -> str:
    """The options that help if the data have only some of a model's classes, or several names for
    one.
    """
    if len(names) > MOST:
        return ""
    marks = [name for name in names if name in NO_LABEL]
    if marks and len(names) - len(marks) == classes:
        return f". To leave out the rows that nobody agreed on: {map_option(dict.fromkeys(marks))}"
    return f". If each is one of the classes 0 to {classes - 1}, say which: {map_option(dict.fromkeys(names, 'NUMBER'))}"


def label_texts(table: Table, name: str) -> list[str | None]:
    """Return the label of each row as a text (NFC), or None if it has none.

    Integers with known names become these.

    Raises:
        DataError: A row has several labels, or a number that is no class. A class id is out of
            range, or contradicts the row's file name. One name is written with different
            characters.
    """
    return _in_one_form(_read_labels(table, name))


def without_hidden(
    columns: Sequence[list[str | None]], aliases: Aliases | None, label_map: Mapping[str, str | None]
) -> list[list[str | None]]:
    """Remove the labels of splits in which every label is -1: data sets hide the labels of a test
    split so.

    -1 stays a label if the model or `label_map` has it, and if the only other label is 1.

    Args:
        columns: The labels of each split.
        aliases: The names of each class of the model, or None.
        label_map: The user's classes for some labels.

    Raises:
        DataError: A split has -1 beside numbers from 0 on. It may be a class, or mean "no label".
    """
    names = {name for of_class in aliases or () for name in of_class} | set(label_map)
    if any(integer(name) == -1 for name in names):
        return list(columns)
    numbers = {text: integer(text) for texts in columns for text in set(texts) if text is not None}
    values = set(numbers.values())
    if -1 not in values or values == {-1, 1} or any(value is None or value < -1 for value in values):
        return list(columns)
    of_split = [{numbers[text] for text in texts if text is not None} for texts in columns]
    for held in of_split:
        if -1 in held and len(held) > 1:
            raise DataError(_minus_one_message(held - {None}))
    return [[None] * len(texts) if held == {-1} else texts for texts, held in zip(columns, of_split, strict=True)]


def _minus_one_message(numbers: Iterable[int | None]) -> str:
    """The message for -1 among other numbers."""
    pairs = {str(number): None if number == -1 else "CLASS" for number in sorted(n for n in numbers if n is not None)}
    return (
        f"the label -1 stands beside {listed([number for number in pairs if number != '-1'])}: is it a class, or a row without "
        f"a label? Say which class of the model each number is, null for none: {map_option(pairs)}"
    )


def left_out(label_map: Mapping[str, str | None], columns: Sequence[Sequence[str | None]]) -> frozenset[str]:
    """Return the labels whose rows are left out: those that `label_map` maps to null.

    Raises:
        DataError: Such a label is not in the data.
    """
    labels = frozenset(composed(label) for label, name in label_map.items() if name is None)
    every = {text for texts in columns for text in texts if text is not None} if labels else set()
    strange = sorted(labels - every)
    if strange:
        raise DataError(
            f"label_map: {listed(strange, every)} {_are(strange)} no label of the data. "
            f"The data's labels are: {listed(sorted(every))}"
        )
    return labels


def _in_one_form(texts: list[str | None]) -> list[str | None]:
    """The labels with composed characters. Two labels must not become one by this."""
    forms = {text: composed(text) for text in set(texts) if text is not None}
    written: dict[str, str] = {}
    for text, form in sorted(forms.items()):
        if form in written:
            raise DataError(
                f"labels of the data that look the same: {text!a} and {written[form]!a} are one name, its characters written "
                "in two ways (composed or not, in Unicode's words). Give them one name"
            )
        written[form] = text
    return [None if text is None else forms[text] for text in texts]


def _read_labels(table: Table, name: str) -> list[str | None]:
    """The labels of a column as texts, as they are written."""
    kind, values = table.rows.features[name], table.rows.with_format(None)[name]
    if isinstance(kind, datasets.ClassLabel):
        own = [_class_name(kind.names, table, row, value) for row, value in enumerate(values)]
        if table.classes is None:
            return own
        _refuse_other_count(kind.names, table.classes)
        ids = [None if label is None else str(value) for label, value in zip(own, values, strict=True)]
        return _with_names(table, table.classes, ids)
    known: dict[str, str] = {}  # keeps one string for each name in place of one for each row
    texts = [None if text is None else known.setdefault(text, text) for text in _as_texts(table, name, values)]
    return texts if table.classes is None else _with_names(table, table.classes, texts)


def _as_texts(table: Table, name: str, values: Sequence[Any]) -> Iterator[str | None]:
    """Yield each label as a text. True and False become 1 and 0 if there are names for integers."""
    for row, raw in enumerate(values):
        value = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        if isinstance(value, list | dict | np.ndarray):
            if all(isinstance(other, list) and len(other) == 1 for other in values if other is not None):
                raise DataError(f"row {table.name(row)}: {name!r} holds one label in a list ({value!r:.60}): write it plain")
            raise DataError(
                f"row {table.name(row)}: {name!r} holds several labels ({value!r:.60}); several labels a row need a text "
                "or image model whose config says `problem_type: multi_label_classification`"
            )
        if isinstance(value, float) and value == value and not value.is_integer():
            raise DataError(f"row {table.name(row)}: the label {value} is no class; scores need a text model with one output")
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            yield None
        elif isinstance(value, float) or (isinstance(value, bool) and table.classes is not None):
            yield str(int(value))
        else:
            yield str(value)


def _refuse_other_count(own: Sequence[str], label_names: Sequence[str]) -> None:
    """Refuse `label_names` with another number of names than the data set's own classes."""
    if len(own) != len(label_names):
        raise DataError(
            f"label_names has {len(label_names)} names, the data set's own classes are {len(own)}: {listed(own)}. "
            "Give one name for each, in this order, or leave label_names out"
        )


def _class_name(names: Sequence[str], table: Table, row: int, value: int | None) -> str | None:
    if value is None or value == -1:  # data sets hide the labels of a test split by -1
        return None
    if not 0 <= value < len(names):
        raise DataError(f"row {table.name(row)}: class id {value} is outside 0..{len(names) - 1}{_say_ids(table, value)}")
    return str(names[value])


def _say_ids(table: Table, value: int) -> str:
    if table.classes is None:
        return ""
    pair = map_option({str(value): "CLASS"}).replace("}", ", …}")
    return f". label_names counts from 0: leave it out, and say which class of the model each number is: {pair}"


def _with_names(table: Table, names: tuple[str, ...], texts: list[str | None]) -> list[str | None]:
    """Replace integers by their names.

    File names that contain a class of ImageNet must agree with them.
    """
    numbers = [None if text is None else integer(text) for text in texts]
    if {-1, 1} == set(numbers) - {None}:
        raise DataError(
            f"{table.origin or 'the data'}: the labels are -1 and 1, and label_names counts from 0: leave it out, and say "
            f"which class of the model each is: {map_option(dict.fromkeys(('-1', '1'), 'CLASS'))}"
        )
    if -1 in numbers and any(number is not None and number >= 0 for number in numbers):
        raise DataError(f"{table.origin or 'the data'}: {_minus_one_message(set(numbers))} (and leave label_names out)")
    labels = [
        text if number is None else _class_name(names, table, row, number)
        for row, (text, number) in enumerate(zip(texts, numbers, strict=True))
    ]
    files = imagenet.synsets_in_file_names(table.rows) if names == imagenet.synsets() else ()
    for row, (name, in_file) in enumerate(zip(labels, files, strict=False)):
        if name is not None and in_file and name not in in_file:
            raise DataError(
                f"row {table.name(row)}: its label {texts[row]} would be {name}, its file is of {' '.join(sorted(in_file))}: "
                "these integers are not ImageNet-1k's. Leave out label_names: imagenet-1k, or give the labels as names"
            )
    return labels


def has_integers(table: Table, name: str) -> bool:
    """Return whether the label column contains numbers, so that `label_names` can name them."""
    if isinstance(table.rows.features[name], datasets.ClassLabel):
        return True
    values = set(table.rows.with_format(None)[name]) - {None}
    return any(isinstance(value, bool | int | float) or are_integers([str(value)]) for value in values)
