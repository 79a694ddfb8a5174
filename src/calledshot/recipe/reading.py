"""From what was typed to what is meant: tables and texts become checked plain data, and plain data becomes a recipe.

Plain data is what TOML and JSON hold: dicts, lists, text, numbers, booleans. `where` names the file in errors.
"""

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from . import units
from .errors import UsageError
from .keys import item, kinds, suggestion
from .schema import Recipe

EXPECTED = {
    bool: "true or false",
    int: "a whole number (8, or in quotes 8k, 1.5M, 3B)",
    float: "a number",
    str: "text in quotes",
}
SHARES = ("held_out", "start", "until", "warmup", "decay", "final", "weight", "weight_decay")
COMMAND_LINE = "command line"
LARGEST = 10**units.LARGEST_EXPONENT


def scalar_parser(key: str, kind: type) -> Callable[[str], float]:
    """How a number written as text is read, by its key: bytes, a time, FLOPs, a share or a count."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf.endswith("bytes"):
        return units.bytes_
    if kind is int:
        return units.whole
    if leaf.endswith("minutes"):
        return units.minutes
    if leaf == "flops":
        return units.flops
    if leaf in SHARES:
        return units.share
    return lambda text: float(units.count(text))


def coerce(kind: Any, value: Any, key: str, where: str) -> Any:
    """`value` as plain data of type `kind`. Raises: `UsageError` that names the place, the key and what is expected."""

    def wrong(expected: str) -> UsageError:
        return UsageError(f"{where}: {key} = {value!r}: expected {expected}")

    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise wrong("a table of keys")
        return read_table(kind, value, where, key + ".")
    if (element := item(kind)) is not None:
        if not isinstance(value, list | tuple):
            raise wrong("a list of tables" if is_dataclass(element) else f"a list, each {EXPECTED[element]}")
        return [coerce(element, one, f"{key}.{place}", where) for place, one in enumerate(value)]
    if kind not in EXPECTED:  # dict[str, float]
        if not isinstance(value, dict):
            raise wrong("a table of names and numbers")
        return {name: coerce(float, one, f"{key}.{name}", where) for name, one in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong(EXPECTED[bool])
        return value
    if kind is str:
        if not isinstance(value, str):
            raise wrong(EXPECTED[str])
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{where}: {key} is not valid UTF-8") from None
        return value
    if isinstance(value, str):
        try:
            value = scalar_parser(key, kind)(value)
        except ValueError as error:
            raise UsageError(f"{where}: {key} = {value!r}: {error}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(EXPECTED[kind])
    if not -LARGEST < value < LARGEST:
        raise wrong("a finite number")
    if kind is int and value != int(value):
        raise wrong(EXPECTED[int])
    return kind(value)


def read_table(cls: type, table: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The table of section `cls` with every key known and every value of its type; missing keys stay missing."""
    known = kinds(cls)
    for name in table:
        if name not in known:
            what = "section" if isinstance(table[name], dict) and not prefix else "key"
            raise UsageError(f"{where}: unknown {what} {prefix}{name}; {suggestion(prefix + name)}")
    return {name: coerce(known[name], value, prefix + name, where) for name, value in table.items()}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: tables are merged, lists replaced, and so is `duration`, whose keys exclude each other."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        both = isinstance(value, dict) and isinstance(old, dict) and name != "duration"
        merged[name] = merge(old, value) if both else value
    return merged


def split_overrides(tokens: Sequence[str]) -> list[tuple[str, str | None]]:
    """Key and value of each override: `a.b=c`, `--a.b=c` or `--a.b c`; a lone `--a.b` has the value None."""
    pairs: list[tuple[str, str | None]] = []
    rest = [token for token in tokens if token != "--"]
    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if equals and key:
            pairs.append((key, value))
        elif equals or not token.startswith("--"):
            raise UsageError(f"{COMMAND_LINE}: {token!r} is not an override: write KEY=VALUE or --KEY VALUE")
        else:
            pairs.append((key, rest.pop(0) if rest and not rest[0].startswith("--") else None))
    return pairs


def parse_text(kind: Any, text: str | None, key: str) -> Any:
    """The value of one override as `coerce` takes it: lists and tables are TOML, text needs no quotes."""
    if text is None:
        if kind is bool:
            return True
        raise UsageError(f"{COMMAND_LINE}: {key} needs a value: {key}=VALUE or --{key} VALUE")
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        return text
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if kind is str and not quoted:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # TOMLDecodeError, and integers of thousands of digits
        raise UsageError(
            f"{COMMAND_LINE}: {key} = {text!r} is not a TOML value (a list is [1, 2], a table {{a = 1}})"
        ) from None


def override(data: dict[str, Any], key: str, text: str | None) -> None:
    """Set one dotted key of the plain `data` in place. A list of tables is addressed by number, from 0; the number one
    past its end appends."""
    place(data, Recipe, key.split("."), text, key)


def place(node: dict[str, Any], cls: Any, parts: list[str], text: str | None, key: str) -> None:
    """`override` from the table `node` of section `cls` on."""
    name, rest = parts[0].replace("-", "_"), parts[1:]
    kind = kinds(cls).get(name)
    if kind is None or (rest and kind in EXPECTED):
        if key == "extends":
            raise UsageError(f"{COMMAND_LINE}: extends belongs in a file; name the recipe to start from instead")
        what = "key" if "." in key else "key or option"
        raise UsageError(f"{COMMAND_LINE}: unknown {what} {key}; {suggestion(key)}")
    if not rest:
        value = coerce(kind, parse_text(kind, text, key), key, COMMAND_LINE)
        node[name] = merge(node[name], value) if is_dataclass(kind) and name in node else value
        return
    if is_dataclass(kind):
        place(node.setdefault(name, {}), kind, rest, text, key)
        return
    element = item(kind)
    if element is None:
        table = node.setdefault(name, {})
        table[".".join(rest)] = coerce(float, parse_text(float, text, key), key, COMMAND_LINE)
        return
    if not is_dataclass(element):
        raise UsageError(f"{COMMAND_LINE}: {key}: a list is given as a whole: {key.removesuffix('.' + rest[0])}=[...]")
    values = node.setdefault(name, plain(default(cls, name)))
    index = int(rest[0]) if re.fullmatch(r"[0-9]{1,4}", rest[0]) else -1
    if not 0 <= index <= len(values):
        raise UsageError(f"{COMMAND_LINE}: {key}: {name} holds {len(values)}, numbered from 0")
    if index == len(values):
        values.append({})
    if len(rest) == 1:
        values[index] = coerce(element, parse_text(element, text, key), key, COMMAND_LINE)
    else:
        place(values[index], element, rest[1:], text, key)


def default(cls: type, name: str) -> Any:
    """A field's default."""
    return getattr(cls(), name)


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return dict(value) if isinstance(value, dict) else value


def build(cls: Any, data: dict[str, Any]) -> Any:
    """Plain data, already read by `read_table`, as the dataclass `cls`; missing keys take their defaults."""
    values: dict[str, Any] = {}
    for name, value in data.items():
        kind = kinds(cls)[name]
        element = item(kind)
        if is_dataclass(kind):
            values[name] = build(kind, value)
        elif element is not None:
            values[name] = tuple(build(element, one) if is_dataclass(element) else one for one in value)
        else:
            values[name] = value
    return cls(**values)
