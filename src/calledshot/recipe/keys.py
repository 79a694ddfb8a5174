"""The recipe's keys: their names, types and documentation, read from the schema, and the nearest one to a typo."""

import ast
import difflib
import inspect
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from . import schema
from .schema import Recipe


@dataclass(frozen=True)
class Key:
    """One key of the recipe: its dotted name (`N` stands for a place in a list), type, default and documentation."""

    name: str
    type: str
    default: Any
    doc: str


@cache
def kinds(cls: type) -> dict[str, Any]:
    """Field name → type of a section."""
    return get_type_hints(cls)


def item(kind: Any) -> Any:
    """The element type of a `tuple[X, ...]`, else None."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


@cache
def names(cls: type = Recipe, prefix: str = "") -> tuple[str, ...]:
    """Every key's dotted name, in the order of the schema."""
    found: list[str] = []
    for name, kind in kinds(cls).items():
        if is_dataclass(kind):
            found += names(kind, f"{prefix}{name}.")
        elif is_dataclass(item(kind)):
            found += names(item(kind), f"{prefix}{name}.N.")
        else:
            found.append(prefix + name)
    return tuple(found)


def documented() -> list[Key]:
    """Every key with its documentation. Source: the string under each field of `schema.py`."""
    docs: dict[tuple[str, str], str] = {}
    for cls in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for statement, following in zip(cls.body, cls.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[cls.name, statement.target.id] = " ".join(str(following.value.value).split())

    def walk(cls: type, prefix: str) -> list[Key]:
        found: list[Key] = []
        for field in fields(cls):
            kind = kinds(cls)[field.name]
            if is_dataclass(kind):
                found += walk(kind, f"{prefix}{field.name}.")
            elif is_dataclass(item(kind)):
                found += walk(item(kind), f"{prefix}{field.name}.N.")
            else:
                default = field.default if field.default is not MISSING else field.default_factory()
                found.append(Key(prefix + field.name, str(field.type), default, docs[cls.__name__, field.name]))
        return found

    return walk(Recipe, "")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None where none is alike."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggestion(key: str) -> str:
    """What to say after an unknown key: the nearest known one, whatever its case, or where to look."""
    known, key = names(), key.lower()
    sections = sorted({name.split(".")[0] for name in known if "." in name})
    if "." not in key and (section := nearest(key, sections)):
        return f"did you mean {section}?"
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if len(same_leaf) == 1:
        return f"did you mean {same_leaf[0]}?"
    found = nearest(key, known)
    if found is None:
        leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
        found = leaves.get(nearest(leaf, leaves) or "")
    return f"did you mean {found}?" if found else "`shot recipe keys` lists them all"
