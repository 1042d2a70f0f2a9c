"""A bare virtual environment that sees this package's wheel and only what the wheel asks for."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib import metadata
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

distribution = cache(metadata.distribution)
parsed = cache(Requirement)


def needed(requirements: list[str], extra: str = "") -> dict[str, Distribution]:
    """The installed packages that requirements ask for, and those that these need in turn: name -> distribution."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(parsed(text), extra) for text in requirements]
    while waiting:
        requirement, of_extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        found[requirement.name] = package = distribution(requirement.name)
        for asked in ("", *requirement.extras):
            if (requirement.name, asked) not in seen:
                seen.add((requirement.name, asked))
                waiting += [(parsed(text), asked) for text in package.requires or ()]
    return found


def link(packages: dict[str, Distribution], folder: Path) -> Path:
    """Make a folder with a link to each module of these packages, and to their metadata; returns the folder."""
    folder.mkdir()
    for package in packages.values():
        for name in {path.parts[0] for path in package.files or ()} - {"..", "__pycache__"}:
            place = folder / name
            if not place.is_symlink():
                place.symlink_to(Path(str(package.locate_file(name))))
    return folder


def install(wheel: Path, place: Path, packages: Path) -> Path:
    """Make a virtual environment at `place` that has the wheel, and sees `packages`; returns its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    pip = [sys.executable, "-m", "pip", "--python", place / "bin/python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return place / "bin"
