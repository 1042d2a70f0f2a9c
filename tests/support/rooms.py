"""The map of the package, drawn from its imports: `python tests/support/rooms.py [--write|--counts [CHECKOUT]]`.

A room is a package below `dsd_refine/`, or a module at its root. Rooms on one floor do not need each other; each room
needs rooms of lower floors only. CONTRIBUTING.md holds the drawing; `--write` renews it.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
START, END = "<!-- map: python tests/support/rooms.py --write -->\n", "<!-- end of the map -->\n"


def modules(root: Path) -> dict[str, Path]:
    """Dotted name (a package by its own) -> file."""
    found = {}
    for path in sorted((root / "dsd_refine").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def room_of(name: str, known: dict[str, Path]) -> str:
    """The room that a module is in: its package, or itself at the root."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        package = known.get(".".join(["dsd_refine", *parts[:length]]))
        if package is not None and package.name == "__init__.py":
            return ".".join(parts[:length])
    return ".".join(parts) or "__init__"


def arrows(root: Path = ROOT, typing_too: bool = False) -> dict[str, set[str]]:
    """Room -> the rooms that it imports from, also within functions; what is imported for type checkers alone is left out."""
    known, found = modules(root), defaultdict(set)
    for name, path in known.items():
        for module, names in imports(ast.parse(path.read_text(encoding="utf-8")), typing_too):
            for each in names:
                target = f"{module}.{each}" if f"{module}.{each}" in known else module
                found[room_of(name, known)].add(room_of(target, known))
        found[room_of(name, known)].discard(room_of(name, known))
    return {room: found[room] for room in sorted(found)}


def imports(tree: ast.AST, typing_too: bool) -> Iterator[tuple[str, list[str]]]:
    """Each import of the package's own modules: (module, names)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsd_refine"):
            yield node.module or "", [alias.name for alias in node.names]
        yield from imports(node, typing_too)


def floors(found: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the ground floor first. Rooms of a circle never get one: ValueError names them."""
    rest, placed, result = dict(found), set(), []
    while rest:
        floor = sorted(room for room, needs in rest.items() if needs <= placed)
        if not floor:
            raise ValueError(f"these rooms import each other in a circle: {', '.join(sorted(rest))}")
        placed.update(floor)
        result.append(floor)
        rest = {room: needs for room, needs in rest.items() if room not in placed}
    return result


def drawing(root: Path = ROOT) -> str:
    """The map: a line for each room, the highest floor first, with what it is for and what it needs."""
    known, found = modules(root), arrows(root)
    lines = ["```"]
    for number, floor in reversed(list(enumerate(floors(found)))):
        for room in floor:
            if room in ("__init__", "__main__"):
                continue
            doc = ast.get_docstring(ast.parse(known[f"dsd_refine.{room}"].read_text(encoding="utf-8"))) or ""
            name = f"{room.replace('.', '/')}{'/' if known[f'dsd_refine.{room}'].name == '__init__.py' else '.py'}"
            purpose = " ".join(doc.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
            lines.append(f"{number:>2}  {name:22} {purpose}")
            if found[room]:
                lines.append(f"      needs {', '.join(sorted(found[room]))}")
    return "\n".join([*lines, "```"]) + "\n"


def counts(root: Path) -> str:
    """Figures of the tree: rooms, arrows, functions, docstrings, `Any`, `type: ignore`."""
    known, found = modules(root), arrows(root)
    texts = {name: path.read_text(encoding="utf-8") for name, path in known.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for node in functions]
    public = [node for tree in trees.values() for node in public_of(tree)]
    documented = sum(ast.get_docstring(node) is not None for node in public)
    signatures = sum("Any" in ast.dump(node.args) + ast.dump(node.returns or ast.Pass()) for node in functions)
    at_root = sum(path.parent == root / "dsd_refine" for path in known.values())
    longest = max(zip(lengths, (node.name for node in functions), strict=True))
    return "\n".join(
        [
            f"files {len(known)}, at the root {at_root}, rooms {len(found)}, arrows {sum(map(len, found.values()))}",
            f"functions {len(functions)}, median {median(lengths):g} lines, longest {longest[0]} ({longest[1]}), "
            f"over 50 lines {sum(length > 50 for length in lengths)}",
            f"public functions, classes and methods {len(public)}, with a docstring {documented / len(public):.1%}",
            f"signatures with Any {signatures}, `type: ignore` {sum(text.count('type: ignore') for text in texts.values())}",
        ]
    )


def public_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions, classes and their public methods of a module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (each for each in node.body if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"))


def main(args: list[str]) -> None:
    """Print the map, write it into CONTRIBUTING.md, or print the counts."""
    if args[:1] == ["--counts"]:
        sys.stdout.write(counts(Path(args[1]) if len(args) > 1 else ROOT) + "\n")
    elif args == ["--write"]:
        file = ROOT / "CONTRIBUTING.md"
        before, _, rest = file.read_text(encoding="utf-8").partition(START)
        file.write_text(before + START + drawing() + END + rest.partition(END)[2], encoding="utf-8")
    else:
        sys.stdout.write(drawing())


if __name__ == "__main__":
    main(sys.argv[1:])
