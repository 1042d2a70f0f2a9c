"""Read and write YAML: strictly for recipes, and leniently for model cards of strangers.

No file may have aliases, because a few lines of them can expand to gigabytes (a "YAML bomb").
"""

from __future__ import annotations

import re
from typing import Any

import yaml

FLOAT = "tag:yaml.org,2002:float"


class _NoAliases(yaml.SafeLoader):
    """SafeLoader that refuses aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and raise YAMLError if it is an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases (*name), which are not allowed")
        return super().compose_node(parent, index)


class _RecipeLoader(_NoAliases):
    """Refuses duplicate keys, and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, and raise YAMLError if a key is not text or is there twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} is not text; put it into quotes")
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {key!r} is there twice")
        return super().construct_mapping(node, deep=deep)


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes texts that `_RecipeLoader` would read as numbers."""


for _class in (_RecipeLoader, _RecipeDumper):
    _class.add_implicit_resolver(
        FLOAT,
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


class _CardLoader(_NoAliases):
    """Reads plain values as YAML 1.2 does: `no`, `on`, dates and 1:30 are texts."""


_CardLoader.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?(0|[1-9]\d*)$", "-+0123456789"),
    (FLOAT, r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$", "-+.0123456789"),
):
    _CardLoader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def load_recipe_yaml(text: str) -> Any:
    """Read the YAML of a recipe. Duplicate keys are refused.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: The text cannot be read.
    """
    return yaml.load(text, Loader=_RecipeLoader)


def load_card_yaml(text: str) -> Any:
    """Read the YAML of a model card.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: The text cannot be read.
    """
    return yaml.load(text, Loader=_CardLoader)


def dump_recipe_yaml(fields: dict[str, Any]) -> str:
    """Write fields as YAML that `load_recipe_yaml` reads back."""
    return yaml.dump(fields, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)
