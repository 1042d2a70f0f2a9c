"""List the files of a folder, with links followed, and report those that are not used.

Two kinds are not reported: files that systems and tools leave behind (`is_junk`), and papers about
the data (README, LICENSE, …) that do not have the suffix of a table.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dsd_refine.data.files import is_table
from dsd_refine.errors import DataError

JUNK = re.compile(
    r"\.DS_Store|\._.*|\.localized|\.Spotlight-V100|\.fseventsd|\.Trash.*|\.directory|Thumbs\.db|ehthumbs\.db|desktop\.ini"
    r"|__MACOSX|__pycache__|\.ipynb_checkpoints|\.git|\.git(attributes|ignore|keep|modules)|\.cache|\.huggingface|\.nfs.*",
    re.IGNORECASE,
)

PAPERS = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|contributing|authors|datasheet|dataset_infos?|\.huggingface)"
    r"([-_.].*)?",
    re.IGNORECASE,
)

SIDE = re.compile(
    r"(.*[-_. ])?(class(es)?([-_ ]?names?)?|labels?([-_ ]?(names?|map|list))?|label2id|id2label|categories|stats?|statistics"
    r"|vocab(ulary)?|schema|config|info|meta(data)?|mapping|stop[-_ ]?words|columns|requirements)",
    re.IGNORECASE,
)

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
SHOWN = 5  # entries of a folder that a message names


def is_junk(name: str) -> bool:
    """Return whether a system, an editor or git leaves a file of this name in a folder."""
    return JUNK.fullmatch(name) is not None


def is_paper(path: Path) -> bool:
    """Return whether a file is about the data, and no table: README.md, LICENSE, dataset_info.json."""
    about = PAPERS.fullmatch(path.name) is not None
    return about and (not is_table(path) or path.suffix.lower() == ".json")


def is_about(path: Path) -> bool:
    """Return whether a file is about the data by its name, also with the suffix of a text:
    README.txt.
    """
    return is_paper(path) or (PAPERS.fullmatch(path.name) is not None and path.suffix.lower() == ".txt")


def is_side_file(path: Path) -> bool:
    """Return whether a file is a list or numbers beside the data, by its name: classes.txt,
    stats.json.
    """
    return path.suffix.lower() in (".txt", ".json") and SIDE.fullmatch(path.stem) is not None


def entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted, without junk.

    Raises:
        DataError: The folder cannot be listed, or has a name that is not UTF-8.
    """
    try:
        with os.scandir(folder) as scanned:
            inner = sorted(folder / entry.name for entry in scanned if not is_junk(entry.name))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be listed ({error.strerror or error})") from None
    for path in inner:
        refuse_unwritable(path)
    return inner


def refuse_unwritable(path: Path) -> None:
    """Check that a name is UTF-8. Tables, reports and pages cannot contain other names.

    Raises:
        DataError: It is not.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise DataError(f"{shown}: its name is not UTF-8, so no report could name it; rename it") from None


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, and links to folders."""
    return [path for path in entries(folder) if path.is_dir() and not path.name.startswith(".")]


def walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every visible file below a folder, and every path that is not entered.

    Links to folders are followed, after the folders themselves. Each folder is read once. A folder
    that contains this one is not entered.

    Yields:
        A path, and the reason why it is not entered: "" for a file.
    """
    above = {place.resolve() for place in (folder, *folder.absolute().parents, *folder.resolve().parents)}
    read: set[Path] = set()
    places: list[Path] = [folder]
    links: list[Path] = []
    while places or links:
        place = places.pop() if places else links.pop(0)
        real = place.resolve()
        if place != folder and (real in above or real in read):
            yield place, "a link to a folder that holds it" if real in above else "a link to a folder that is read already"
            continue
        read.add(real)
        inner = entries(place)
        if not inner and place != folder:
            yield place, "an empty folder"
        for path in inner:
            if path.name.startswith("."):
                yield path, "hidden"
            elif os.path.isdir(path):  # False for a circular link, where is_dir() raises
                (links if path.is_symlink() else places).append(path)
            else:
                yield path, ""


def files_below(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Return every visible file below a folder, and every path that was not entered with its
    reason, both sorted.
    """
    paths = list(walk(folder))
    return sorted(path for path, reason in paths if not reason), sorted((path, why) for path, why in paths if why)


def left_over(root: Path, used: Iterable[Path], why: Callable[[Path], str]) -> tuple[str, ...]:
    """Say which files and folders under `root` are not used, and why.

    Args:
        root: The folder.
        used: The used files, and the folders that are used as a whole.
        why: Returns the reason for a path.

    Returns:
        One line for each path. If many paths of a folder have one reason, a line names the first of
        them and counts the others.
    """
    taken = set(used)
    holding = {parent for path in taken for parent in path.parents}
    lines: list[str] = []
    places = [root]
    while places:
        groups: dict[str, list[str]] = defaultdict(list)
        for path in entries(places.pop(0)):
            if path in taken or is_paper(path):
                continue
            if path in holding:
                places.append(path)
                continue
            name = path.relative_to(root).as_posix() + "/" * os.path.isdir(path)
            groups[_general_reason(path) or why(path)].append(name)
        for reason, names in groups.items():
            more = f" and {len(names) - SHOWN} more beside them" if len(names) > SHOWN else ""
            lines += [f"{', '.join(names[:SHOWN])}{more}: {reason}"] if more else [f"{name}: {reason}" for name in names]
    return tuple(lines)


def _general_reason(path: Path) -> str:
    """The reason why a path is never read, in data of any form. Empty: there is none."""
    if path.is_symlink() and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which is not there"
    if path.name.startswith("."):
        return "hidden"
    if os.path.isdir(path):
        return "" if entries(path) else "an empty folder"
    if PAPERS.fullmatch(path.name):
        return "a paper about the data"
    if path.suffix.lower() in ARCHIVES and not is_table(path):
        return "an archive; unpack it to use it"
    return ""
