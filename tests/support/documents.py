"""The documents as a reader sees them: their blocks of code with what marks them, and their commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^>]+) -->\n)?```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
INLINE = re.compile(r"(?<!`)`(dsd-refine [^`\n]+)`(?!`)")
PROGRAMS = ("dsd-refine", "make", "pip", "python", "torchrun", "accelerate", "hf", "sbatch", ".")


@dataclass(frozen=True)
class Block:
    """A block of code. `needs` is what its mark says it needs (network, gpu, …); None: it runs anywhere."""

    page: Path
    line: int
    kind: str
    text: str
    needs: str | None

    @property
    def name(self) -> str:
        """`docs/ci.md:12`, for the name of a test."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path, kind: str | None = None) -> list[Block]:
    """The blocks of a page in order, of one kind if it is given."""
    text = page.read_text("utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start("kind")) + 1, match["kind"], match["text"], match["needs"])
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if kind in (None, block.kind)]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, cut into words. Comments are left out, and lines that end with a backslash joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def inline_commands(page: Path) -> list[list[str]]:
    """The commands of dsd-refine within sentences."""
    return [shlex.split(found) for found in INLINE.findall(page.read_text("utf-8"))]
