"""Write the pages of the site that have another source, each time that mkdocs builds it.

README.md is the start. The reference comes from the options of the command, from the fields of a recipe and from
the public names of the package, so it cannot be out of date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

import dsd_refine
from dsd_refine.cli.app import cli
from dsd_refine.recipe import Augment, Distill, Phase, Recipe, Search, shipped

ROOT = Path(__file__).parent.parent
MODELS = (Recipe, Phase, Distill, Augment, Search)
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/. mkdocs calls this with the files of docs/."""
    readme = (ROOT / "README.md").read_text("utf-8").replace('src="docs/', 'src="')
    pages = {
        "index.md": readme.replace("](docs/", "](").replace("](docs)", "](index.md)"),
        "reference/command.md": command_page(),
        "reference/recipe.md": recipe_page(),
        "reference/python.md": python_page(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Name files that are in the repository and not on the site, instead of linking them."""
    folder = Path(page.file.src_uri).parent

    def replaced(link: re.Match[str]) -> str:
        text, target, _ = link.groups()
        place = (ROOT / "docs" / folder / target).resolve()
        if place.is_relative_to(ROOT / "docs") or not place.exists():  # mkdocs checks what is in docs/
            return link[0]
        return f"{text} (`{place.relative_to(ROOT)}`)"

    return LINK.sub(replaced, markdown)


def command_page() -> str:
    """Return the reference of the command: each verb with its options, in the groups of `--help`."""
    lines = ["# Command", "", "`dsd-refine MODEL …` is short for `dsd-refine run MODEL …`.", ""]
    for name, verb in cli.commands.items():
        lines += [f"## {name}", "", *_usage(name, verb), *_options(verb)]
        for inner, command in getattr(verb, "commands", {}).items():
            lines += [f"### {name} {inner}", "", *_usage(f"{name} {inner}", command)]
    return "\n".join(lines)


def _usage(name: str, verb: click.Command) -> Iterator[str]:
    arguments = [parameter.human_readable_name for parameter in verb.params if isinstance(parameter, click.Argument)]
    yield from (" ".join(["    dsd-refine", name, *arguments]), "", (verb.help or "").strip(), "")


def _options(verb: click.Command) -> Iterator[str]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in verb.params:
        record = parameter.get_help_record(click.Context(verb))
        if isinstance(parameter, click.Option) and record:
            groups.setdefault(getattr(parameter, "group", "Help"), []).append(record)
    for group, records in groups.items():
        yield from ("", f"**{group}**", "", "| option | meaning (default) |", "|---|---|")
        yield from (f"| `{_cell(names)}` | {_cell(meaning)} |" for names, meaning in records)
    yield ""


def recipe_page() -> str:
    """Return the reference of recipes: each field with its type, default and meaning."""
    lines = [
        "# Recipe",
        "",
        "A recipe is a YAML file with these fields. `--set phases.0.lr=0.01` sets one, and many have an option of their own.",
        "",
        "Shipped: " + ", ".join(f"`{name}`" for name in shipped()) + ".",
        "",
    ]
    for model in MODELS:
        lines += [f"## {model.__name__}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        meanings = field_meanings(model)
        for name, field in model.model_fields.items():
            default = "needed" if field.is_required() else _default(field.default)
            kind = _type(model.model_json_schema()["properties"][name])
            lines.append(f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(meanings.get(name, ''))} |")
        lines.append("")
    return "\n".join(lines)


def field_meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> meaning: from the docstring of the model, else from the option of the same name.

    The docstring has lines `name: meaning` under "Attributes:", or sentences that begin with `name` or `name: value`.
    """
    options = {parameter.name: getattr(parameter, "help", "") for parameter in cli.commands["run"].params}
    known = {name: options[name] for name in model.model_fields if options.get(name)} if model is Recipe else {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (model.__doc__ or "").splitlines()[1:]:
        attribute = re.match(r" {8}(\w+): (.*)", line)
        sentence = re.match(r" {4}(`\w+(?:: \w+)?`(?: and `\w+`)*) .*", line)
        if attribute:
            names, text = [attribute[1]], attribute[2]
        elif sentence:
            names, text = re.findall(r"`(\w+)", sentence[1]), line.strip()
        else:
            text = line.strip()
        for name in names:
            found[name] = f"{found.get(name, '')} {text}".strip()
    return known | found


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if kinds := schema.get("anyOf"):
        return " or ".join(_type(kind) for kind in kinds)
    if values := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in values)
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    words = {"string": "text", "object": "mapping", "boolean": "true or false"}
    kind = schema.get("type", "any")
    return f"{words.get(kind, kind)}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in limits.items() if key in schema and abs(schema[key]) < 1e9]
    return f" ({', '.join(bounds)})" if bounds else ""


def _default(value: Any) -> str:
    return "its own defaults" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """Return a value as YAML writes it, in one line."""
    if value is None:
        return "null"
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, tuple) else str(value)


def python_page() -> str:
    """Return the reference of Python: mkdocstrings fills in each public name's signature and docstring."""
    lines = ["# Python", "", "How they go together: [From Python](../python.md).", ""]
    names = sorted((name for name in dsd_refine.__all__ if name != "__version__"), key=_order)
    return "\n".join([*lines, *(f"::: dsd_refine.{name}\n" for name in names)])


def _order(name: str) -> tuple[bool, bool, str]:
    """Return what sorts functions before classes, and errors to the end."""
    return name.endswith("Error") or name == "Interrupted", name[0].isupper(), name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
