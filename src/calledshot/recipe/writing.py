"""A recipe as plain data, as TOML and as a hash, and what differs between two."""

import hashlib
import json
import re
from dataclasses import fields, is_dataclass
from typing import Any

from .check import check
from .reading import build, plain, read_table
from .schema import IDENTITY_EXCLUDES, Recipe

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every key with its value, as JSON and TOML can hold it."""
    return plain(recipe)


def from_dict(data: dict[str, Any], file: str = "recipe") -> Recipe:
    """The recipe that `to_dict` or a parsed TOML file describes; missing keys take their defaults. Raises: `UsageError`
    that names `file` and the key."""
    recipe = build(Recipe, read_table(Recipe, data, file))
    check(recipe, file)
    return recipe


def toml_value(value: Any) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(one) for one in value) + "]"
    if isinstance(value, dict):
        pairs = (
            f"{name if BARE_KEY.fullmatch(name) else toml_value(name)} = {toml_value(value[name])}" for name in value
        )
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    return repr(value)


def to_toml(recipe: Recipe) -> str:
    """Every key with its value as a TOML file; `load_recipe` on it gives the same recipe. Two equal recipes give the
    same text."""
    lines: list[str] = []

    def table(value: Any, header: str) -> None:
        if header:
            lines.extend(["", header])
        name = header.strip("[]")
        inner = [field.name for field in fields(value) if not nested(getattr(value, field.name))]
        lines.extend(f"{key} = {toml_value(getattr(value, key))}" for key in inner)
        for field in fields(value):
            one = getattr(value, field.name)
            path = f"{name}.{field.name}" if name else field.name
            if is_dataclass(one):
                table(one, f"[{path}]")
            elif nested(one):
                for element in one:
                    table(element, f"[[{path}]]")

    table(recipe, "")
    return "\n".join(lines) + "\n"


def nested(value: Any) -> bool:
    """Whether TOML writes the value under its own header."""
    return is_dataclass(value) or (isinstance(value, tuple) and bool(value) and is_dataclass(value[0]))


def identity(recipe: Recipe) -> str:
    """SHA-256 (hex) of what decides the run: every key but `IDENTITY_EXCLUDES`. Compare it with that of a run's own
    recipe.toml read by this version, which fills in keys that are newer than the run."""
    return hashlib.sha256(json.dumps(decisive(recipe), sort_keys=True).encode()).hexdigest()


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The plain recipe without the keys that may change between incarnations."""
    data = to_dict(recipe)
    for key in IDENTITY_EXCLUDES:
        *sections, leaf = key.split(".")
        node = data
        for section in sections:
            node = node[section]
        del node[leaf]
    return data


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; tables in lists are numbered."""
    if isinstance(data, list) and data and isinstance(data[0], dict):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def difference(a: Recipe, b: Recipe, identity_only: bool = False) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every key that differs, None where one lacks it; with `identity_only`, of those
    alone that decide the run."""
    flat_a, flat_b = (flatten(decisive(one) if identity_only else to_dict(one)) for one in (a, b))
    keys = list(dict.fromkeys([*flat_a, *flat_b]))
    return [(key, flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)]
