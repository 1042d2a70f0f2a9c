"""Names of classes: when two are the same, how they are shown, and which of two lists may mean each other."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import yaml

MOST = 12  # names that a message shows
PLACEHOLDER = re.compile("label_([0-9]+)", re.IGNORECASE)
# letters of other scripts that look like a Latin one
_LOOKS = str.maketrans("АВЕКМНОРСТХІЈЅаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEKMHOPCTXIJSaeopcyxijsABEZHIKMNOPTYXo")


def composed(name: str) -> str:
    """The same text with composed characters (NFC): macOS writes an é of a folder's name as two."""
    return unicodedata.normalize("NFC", name)


def plain(name: str) -> str:
    """What two spellings of a name share: without capitals, underscores, surplus spaces, leading zeros; 1.0 is 1."""
    name = re.sub(r"^([0-9]+)\.0+$", r"\1", composed(name).strip())
    name = re.sub("^0+(?=[0-9]+$)", "", name)  # a table's reader takes 01 for 1
    return " ".join(name.replace("_", " ").casefold().split())


def integer(text: str) -> int | None:
    """The whole number that a text is: `7`, `07`, `-1`, ` 7`, `7.0`; None where it is none."""
    found = re.fullmatch(r"\s*([+-]?[0-9]+)(?:\.0*)?\s*", text)
    return int(found[1]) if found and len(found[1]) < 20 else None


def are_integers(names: Iterable[str]) -> bool:
    return all(integer(name) is not None for name in names)


def are_measures(names: Iterable[str]) -> bool:
    """Are these numbers of which some are not whole: scores, not classes?"""
    return all(re.fullmatch(r"\s*[+-]?([0-9]+|[0-9]*\.[0-9]+)\s*", name) for name in names) and not are_integers(names)


def placeholder(name: str) -> int | None:
    """The class that `LABEL_k`, in capitals or not, is the number of; None for a name that says something."""
    found = PLACEHOLDER.fullmatch(name.strip())
    return int(found[1]) if found else None


def are_placeholders(names: Sequence[str]) -> bool:
    """Are these a config's names for classes that nobody named: LABEL_0, LABEL_1, … in this order?"""
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def listed(names: Sequence[str], beside: Iterable[str] = (), most: int = MOST) -> str:
    """The first names of a list in one line, each told from its neighbours and from the look-alikes among `beside`."""
    first = shown(names[:most], {*names, *beside})
    rest = f", … ({len(names)} in all)" if len(names) > most else ""
    quoted = any("," in name for name in first)
    return ", ".join(f'"{name}"' if quoted else name for name in first) + rest


def shown(names: Sequence[str], beside: Iterable[str] = ()) -> list[str]:
    """Names as a reader can tell them apart: one that looks like another, or hides a character, with its escapes."""
    alike = Counter(looks(name) for name in {*names, *beside})
    return [ascii(name) if hides(name) or alike[looks(name)] > 1 else name for name in names]


def hides(name: str) -> bool:
    """Has it something that is not seen: outer spaces, zero-width characters, letters that are no Latin ones for a reader?"""
    return not name.isprintable() or name != name.strip() or name == ""


def looks(name: str) -> str:
    """What a reader sees of a name: equal for two names that look the same."""
    seen = composed(name).translate(_LOOKS)
    return " ".join("".join(c for c in seen if unicodedata.category(c) != "Cf").split())


def counterparts(labels: Sequence[str], classes: Sequence[str]) -> dict[str, str] | None:
    """The class that each label seems to mean, or None unless each seems to mean one, no two of them the same."""
    found = {label: _counterpart(label, classes) for label in labels}
    if None in found.values() or len(set(found.values())) < len(found):
        return None
    return {label: name for label, name in found.items() if name is not None}


def _counterpart(label: str, classes: Sequence[str]) -> str | None:
    number = placeholder(label)
    if number is not None:
        return classes[number] if number < len(classes) else None
    seen = plain(looks(label))
    same = [name for name in classes if plain(looks(name)) == seen]
    begun = [name for name in classes if len(seen) > 1 and _one_begins_the_other(plain(looks(name)), seen)]
    candidates = same or begun
    return candidates[0] if len(candidates) == 1 else None


def _one_begins_the_other(a: str, b: str) -> bool:
    return len(a) > 1 and (a.startswith(b) or b.startswith(a))


def map_option(pairs: Mapping[str, str | None]) -> str:
    """The option for a shell that maps these labels: `--set 'label_map={neg: NEGATIVE, "-": null}'`."""
    inner = ", ".join(f"{_yaml(label)}: {'null' if name is None else _yaml(name)}" for label, name in pairs.items())
    return f"--set {shlex.quote(f'label_map={{{inner}}}')}"


def names_form(count: int) -> str:
    """The form of the option that names the integers from 0: only who knows the data can fill it in."""
    inner = ", ".join(f"name of {number}" for number in range(min(count, 3)))
    return f"--set 'label_names=[{inner}{', …' if count > 3 else ''}]'"


def by_number(labels: Sequence[str], classes: Sequence[str]) -> dict[str, str] | None:
    """The class whose name holds the number that a label is: 1 -> "1 star". None unless each name holds one of its own."""
    held = [re.findall("[0-9]+", name) for name in classes]
    owners = {int(numbers[0]): name for name, numbers in zip(classes, held, strict=True) if len(numbers) == 1}
    wanted = {label: owners.get(number) for label in labels if (number := integer(label)) is not None}
    if len(owners) < len(classes) or len(wanted) < len(labels):
        return None
    pairs = {label: name for label, name in wanted.items() if name is not None}
    return pairs if len(set(pairs.values())) == len(labels) else None


def _yaml(text: str) -> str:
    """As YAML reads it back as this text: bare where it may be, else quoted, what might be misread as escapes."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_ -]*|…", text) and text == text.strip() and yaml.safe_load(text) == text:
        return text
    clear = text.isprintable() and composed(text) == text and not (looks(text) != text and re.search("[A-Za-z]", text))
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if clear else "".join(c if c.isascii() and c.isprintable() else _escape(c) for c in quoted)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
