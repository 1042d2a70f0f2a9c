"""Names of classes: when two names are the same, how to show them, and how to match two lists of
names.
"""

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
# letters of other scripts, and the Latin letters that they look like
_LOOKS = str.maketrans("АВЕКМНОРСТХІЈЅаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEKMHOPCTXIJSaeopcyxijsABEZHIKMNOPTYXo")


def composed(name: str) -> str:
    """Return the text with composed characters (NFC). macOS writes the é of a folder's name as two
    characters.
    """
    return unicodedata.normalize("NFC", name)


def plain(name: str) -> str:
    """Return a form that two spellings of a name have in common.

    It has no capitals, no underscores, no surplus spaces and no leading zeros, and 1.0 becomes 1.
    """
    name = re.sub(r"^([0-9]+)\.0+$", r"\1", composed(name).strip())
    name = re.sub("^0+(?=[0-9]+$)", "", name)  # the readers of tables take 01 for 1
    return " ".join(name.replace("_", " ").casefold().split())


def integer(text: str) -> int | None:
    """Return the integer that a text is (`7`, `07`, `-1`, ` 7`, `7.0`), or None."""
    match = re.fullmatch(r"\s*([+-]?[0-9]+)(?:\.0*)?\s*", text)
    return int(match[1]) if match and len(match[1]) < 20 else None


def are_integers(names: Iterable[str]) -> bool:
    """Return whether all names are integers."""
    return all(integer(name) is not None for name in names)


def are_measures(names: Iterable[str]) -> bool:
    """Return whether all names are numbers, and some are no integers: scores, not classes."""
    return all(re.fullmatch(r"\s*[+-]?([0-9]+|[0-9]*\.[0-9]+)\s*", name) for name in names) and not are_integers(names)


def placeholder(name: str) -> int | None:
    """Return k for a name `LABEL_k`, in capitals or not, and None for every other name."""
    match = PLACEHOLDER.fullmatch(name.strip())
    return int(match[1]) if match else None


def are_placeholders(names: Sequence[str]) -> bool:
    """Return whether these are the names that a config gives to unnamed classes: LABEL_0, LABEL_1,
    …
    """
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def listed(names: Sequence[str], beside: Iterable[str] = (), most: int = MOST) -> str:
    """Return the first `most` names of a list in one line.

    Names that look like another one, of the list or of `beside`, are shown with escapes.
    """
    first = shown(names[:most], {*names, *beside})
    rest = f", … ({len(names)} in all)" if len(names) > most else ""
    quoted = any("," in name for name in first)
    return ", ".join(f'"{name}"' if quoted else name for name in first) + rest


def shown(names: Sequence[str], beside: Iterable[str] = ()) -> list[str]:
    """Return names so that a reader can tell them apart.

    A name that looks like another one, or has invisible characters, is shown with escapes.
    """
    alike = Counter(looks(name) for name in {*names, *beside})
    return [ascii(name) if hides(name) or alike[looks(name)] > 1 else name for name in names]


def hides(name: str) -> bool:
    """Return whether a name has characters that a reader does not see: outer spaces, zero-width
    characters.
    """
    return not name.isprintable() or name != name.strip() or name == ""


def looks(name: str) -> str:
    """Return a form that is equal for two names that look the same."""
    seen = composed(name).translate(_LOOKS)
    return " ".join("".join(c for c in seen if unicodedata.category(c) != "Cf").split())


def counterparts(labels: Sequence[str], classes: Sequence[str]) -> dict[str, str] | None:
    """Return the class that each label seems to mean.

    None: a label seems to mean none, or two the same.
    """
    meant = {label: _counterpart(label, classes) for label in labels}
    if None in meant.values() or len(set(meant.values())) < len(meant):
        return None
    return {label: name for label, name in meant.items() if name is not None}


def _counterpart(label: str, classes: Sequence[str]) -> str | None:
    """The only class that looks like the label, or else the only one of which one name begins the
    other.
    """
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
    """Return the shell option that maps these labels: `--set 'label_map={neg: NEGATIVE, "-":
    null}'`.
    """
    inner = ", ".join(f"{_yaml(label)}: {'null' if name is None else _yaml(name)}" for label, name in pairs.items())
    return f"--set {shlex.quote(f'label_map={{{inner}}}')}"


def names_form(count: int) -> str:
    """Return a template of the option that names the integers from 0.

    The user must fill in the names.
    """
    inner = ", ".join(f"name of {number}" for number in range(min(count, 3)))
    return f"--set 'label_names=[{inner}{', …' if count > 3 else ''}]'"


def by_number(labels: Sequence[str], classes: Sequence[str]) -> dict[str, str] | None:
    """Return, for labels that are numbers, the class whose name contains that number: 1 -> "1
    star".

    None: a name does not contain exactly one number, or a label's number is in no name.
    """
    in_names = [re.findall("[0-9]+", name) for name in classes]
    owners = {int(numbers[0]): name for name, numbers in zip(classes, in_names, strict=True) if len(numbers) == 1}
    wanted = {label: owners.get(number) for label in labels if (number := integer(label)) is not None}
    if len(owners) < len(classes) or len(wanted) < len(labels):
        return None
    pairs = {label: name for label, name in wanted.items() if name is not None}
    return pairs if len(set(pairs.values())) == len(labels) else None


def _yaml(text: str) -> str:
    """Write a text so that YAML reads it back: without quotes if possible, and unclear characters
    as escapes.
    """
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_ -]*|…", text) and text == text.strip() and yaml.safe_load(text) == text:
        return text
    clear = text.isprintable() and composed(text) == text and not (looks(text) != text and re.search("[A-Za-z]", text))
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if clear else "".join(c if c.isascii() and c.isprintable() else _escape(c) for c in quoted)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
