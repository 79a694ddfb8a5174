"""From a name on the command line to a recipe: presets, files, `extends`, overrides."""

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .check import check
from .errors import UsageError
from .keys import nearest
from .reading import build, merge, override, read_table, split_overrides
from .schema import Recipe

PACKAGED = Path(__file__).resolve().parents[1] / "recipes"
CHECKOUT = Path(__file__).resolve().parents[3] / "recipes"
LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Preset:
    """A recipe that comes with the package."""

    name: str
    path: Path
    summary: str
    """First line of the file's header."""


def presets() -> list[Preset]:
    """The recipes that come with the package, small ones first."""
    folder = PACKAGED if PACKAGED.is_dir() else CHECKOUT
    found = []
    for path in folder.glob("*.toml"):
        with path.open(encoding="utf-8") as file:
            found.append(Preset(path.stem, path, file.readline().lstrip("# ").strip()))
    return sorted(found, key=lambda preset: (size_in_name(preset.name), preset.name))


def size_in_name(name: str) -> float:
    """`125M` and `ul2-125M` → 125e6; names without a size come first."""
    units = {"M": 1e6, "B": 1e9}
    last = name.rpartition("-")[2]
    return float(last[:-1]) * units[last[-1]] if last[:-1].isdecimal() and last[-1] in units else 0.0


def load_recipe(reference: str, overrides: Sequence[str] = (), checked: bool = True) -> Recipe:
    """The recipe that `reference` (a preset's name or a TOML file) gives with `overrides` (`a.b=c`, `--a.b=c` and
    `--a.b c` alike) laid on it. Command line > file > what it extends > defaults. A `duration` replaces the one below
    it as a whole.

    Raises: `UsageError` that names the file, the key and the way out. With `checked=False` values that do not fit
    together are let through, for `problems` to list.
    """
    path = find(reference)
    data = read_chain(path, reference, ())
    pairs = split_overrides(overrides)
    if any(key.split(".")[0] == "duration" for key, _ in pairs):
        data["duration"] = {}
    for key, text in pairs:
        override(data, key, text)
    recipe = build(Recipe, data)
    if checked:
        check(recipe, f"{reference} with the command line's keys" if pairs else reference)
    return recipe


def find(reference: str, folder: Path = Path()) -> Path:
    """The file of a preset's name or of a path, which is taken relative to `folder`."""
    known = {preset.name: preset.path for preset in presets()}
    if is_path(reference):
        return folder / reference
    if reference in known:
        return known[reference]
    if reference and os.path.exists(folder / reference):
        return folder / reference
    near = nearest(reference, known)
    hint = f"did you mean {near}? " if near else ""
    raise UsageError(f"no preset {reference!r} and no file of that name; {hint}presets: {', '.join(known)}")


def is_path(reference: str) -> bool:
    """Whether a reference can only be a path."""
    return "/" in reference or "\\" in reference or reference.endswith(".toml")


def read_chain(path: Path, name: str, chain: tuple[tuple[Path, str], ...]) -> dict[str, Any]:
    """The checked plain data of a file laid on what it extends; `name` is what errors call the file."""
    table = read_toml(path, name)
    here = path.resolve()
    if here in [seen for seen, _ in chain]:
        circle = " → ".join([*(called for _, called in chain), name])
        raise UsageError(f"{chain[0][1]}: extends goes in a circle: {circle}")
    base = table.pop("extends", None)
    data = read_table(Recipe, table, name)
    if base is None:
        return data
    if not isinstance(base, str) or not base:
        raise UsageError(f"{name}: extends = {base!r}: expected a preset's name or a path in quotes")
    try:
        below = find(base, path.parent)
    except UsageError as error:
        raise UsageError(f"{name}: extends: {error}") from None
    called = str(below) if is_path(base) else base
    return merge(read_chain(below, called, (*chain, (here, name))), data)


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """A TOML file's table. Raises: `UsageError` with one line for whatever is wrong with it."""
    try:
        if path.is_dir():
            inside = path / "recipe.toml"
            hint = f"; did you mean {inside}?" if inside.is_file() else ", not a recipe"
            raise UsageError(f"{name}: is a directory{hint}")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UsageError(f"{name}: no such file; `shot recipe list` names the presets") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > LARGEST_FILE:
        raise UsageError(f"{name}: larger than 1 MiB, so not a recipe")
    if b"\0" in content:
        raise UsageError(f"{name}: is binary, not a TOML file")
    try:
        table = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{name}: not UTF-8 (line {line}); save it as UTF-8") from None
    except ValueError as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{name}: not valid TOML: nested too deeply") from None
    if not table:
        raise UsageError(f"{name}: empty; a recipe needs at least a duration, or `extends` and a preset's name")
    return table
