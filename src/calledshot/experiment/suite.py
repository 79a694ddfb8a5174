"""A suite: arms that belong together, as a TOML file. What it says is read here; `matching` makes recipes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from calledshot.recipe import Recipe, UsageError
from calledshot.recipe.keys import item, nearest
from calledshot.recipe.keys import kinds as recipe_keys
from calledshot.recipe.load import is_path, read_toml
from calledshot.recipe.reading import coerce, read_table

PACKAGED = Path(__file__).resolve().parents[1] / "suites"
CHECKOUT = Path(__file__).resolve().parents[3] / "suites"
MATCHES = ("parameters", "non-embedding", "active", "flops", "seconds", "none")
"""What an arm can be given as much of as the baseline."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*(?:-[A-Za-z0-9._+]+)*")
OWNED = ("name", "seed")
"""Recipe keys that the suite itself sets for each run."""
LONGEST_RUN_NAME = 120
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Size:
    """One size at which every arm is compared."""

    name: str = ""
    """As tables and runs call it: `0.3M`."""
    tokens: int = 0
    """Training tokens of the baseline, and of every arm whose tokens are not what is matched."""
    flops: float = 0.0
    """Instead of `tokens`: training FLOPs of the baseline, from which its tokens follow."""
    seeds: tuple[int, ...] = ()
    """Seeds of every arm at this size; empty leaves it to the suite."""
    set: dict[str, Any] = field(default_factory=dict)
    """Recipe keys of this size."""


@dataclass(frozen=True)
class Arm:
    """One modification."""

    name: str = ""
    """As tables and runs call it."""
    note: str = ""
    """What is changed and where it comes from, for the report."""
    set: dict[str, Any] = field(default_factory=dict)
    """Recipe keys of this arm."""
    at: dict[str, Any] = field(default_factory=dict)
    """More of them at some sizes: a table of recipe keys by the size's name."""
    start: str = ""
    """Arm, further up, whose finished run of the same size and seed this one begins with; its cost counts too."""
    convert: tuple[str, ...] = ()
    """What `shot convert` makes of that run first: `["upcycle", "--experts", "8"]`."""
    match: str = ""
    """What this arm is given as much of as the baseline; empty takes the suite's."""
    adjust: tuple[str, ...] = ()
    """Keys that may be moved to match; empty takes the suite's."""
    sizes: tuple[str, ...] = ()
    """Sizes at which this arm is run; empty means all."""


@dataclass(frozen=True)
class Eval:
    """One more question to every finished run: `shot eval RUN ARGUMENTS --json`."""

    name: str = ""
    """As tables call it."""
    arguments: tuple[str, ...] = ()
    """Options of `shot eval`."""
    convert: tuple[str, ...] = ()
    """What `shot convert` makes of the run before it is asked: `["extend", "--context", "512"]`."""
    arms: tuple[str, ...] = ()
    """Arms that are asked; empty means all."""
    field: str = "bits_per_byte"
    """The number taken from each source of what it prints; lower is better."""


@dataclass(frozen=True)
class Suite:
    """All that an ablation compares."""

    name: str = ""
    """Runs are called NAME-ARM-SIZE-sSEED; empty takes the file's."""
    about: str = ""
    """The question, in a sentence or two."""
    recipe: str = "demo"
    """Preset or path (relative to the file) that every run starts from."""
    set: dict[str, Any] = field(default_factory=dict)
    """Recipe keys of every run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the arms in `comparisons`, or of all arms where there are none; the others get the first."""
    match: str = "parameters"
    """`parameters` (all), `non-embedding`, `active`, `flops` (of the whole run), `seconds` (measured) or `none`."""
    adjust: tuple[str, ...] = ()
    """Keys that may be moved to match, tried one after the other, each alone; see `matching.ADJUST`."""
    baseline: str = ""
    """The arm that others are measured against; empty takes the first."""
    sizes: tuple[Size, ...] = ()
    arms: tuple[Arm, ...] = ()
    comparisons: Pairs = ()
    """Pairs of arms that are run with all seeds and tested against each other; every arm is against the baseline."""
    evals: tuple[Eval, ...] = ()
    """More questions to every finished run."""
    judge: str = ""
    """The one of `evals` whose number the verdicts are about, where the held-out losses that runs measure of themselves
    are not of the same text; empty takes these."""
    overrides: tuple[str, ...] = field(default=(), metadata={"key": False})
    """Recipe keys of the command line, laid on top of everything; no key of the file."""
    folder: Path = field(default=Path(), metadata={"key": False})
    """Where the file lies; no key of the file."""

    @property
    def reference(self) -> Arm:
        """The baseline."""
        return self.arm(self.baseline)

    def arm(self, name: str) -> Arm:
        """The arm of that name. UsageError with the nearest one."""
        return _named(self.arms, name, f"suite {self.name} has no arm")

    def size(self, name: str) -> Size:
        """The size of that name. UsageError with the nearest one."""
        return _named(self.sizes, name, f"suite {self.name} has no size")

    def arms_at(self, size: Size) -> list[Arm]:
        """The arms that are run at a size, the baseline always among them."""
        return [arm for arm in self.arms if not arm.sizes or size.name in arm.sizes or arm is self.reference]

    def seeds_of(self, arm: Arm, size: Size) -> tuple[int, ...]:
        """Seeds that an arm is run with at a size."""
        if size.seeds:
            return size.seeds
        named = {name for pair in self.comparisons for name in pair} | {self.baseline}
        return self.seeds if not self.comparisons or arm.name in named else self.seeds[:1]

    def match_of(self, arm: Arm) -> str:
        """What an arm is matched by."""
        return arm.match or self.match

    def run_name(self, arm: str, size: str, last: str) -> str:
        """Name of a run; `last` is `s0` for seed 0."""
        return f"{self.name}-{arm}-{size}-{last}"


def suites() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    folder = PACKAGED if PACKAGED.is_dir() else CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_suite(reference: str, overrides: Sequence[str] = (), name: str = "") -> Suite:
    """The suite of that name (of `suites`) or file. `overrides` are recipe keys as `shot train` takes them, laid on
    every run; `name` replaces the suite's own, and with it the runs'. UsageError names the place and the way out."""
    known = suites()
    if not is_path(reference) and reference in known:
        path = known[reference]
    elif is_path(reference) or Path(reference).is_file():
        path = Path(reference)
    else:
        near = nearest(reference, known)
        hint = f"did you mean {near}? " if near else ""
        raise UsageError(f"no suite {reference!r} and no file of that name; {hint}suites: {', '.join(known)}")
    suite = read_suite(read_toml(path, reference), reference, path)
    suite = replace(suite, overrides=tuple(overrides), name=name or suite.name)
    for problem in problems(suite):
        raise UsageError(f"{reference}: {problem}")
    return suite


def read_suite(table: dict[str, Any], where: str, path: Path) -> Suite:
    """The suite that a parsed file describes."""
    suite = Suite(**_section(Suite, table, where), folder=path.parent)
    baseline = suite.baseline or (suite.arms[0].name if suite.arms else "")
    return replace(suite, name=suite.name or path.stem, baseline=baseline)


def problems(suite: Suite) -> Iterator[str]:
    """What keeps a suite from being run; each one line with the way out."""
    for key in ("sizes", "arms", "seeds"):
        if not getattr(suite, key):
            yield f"{key} is empty: an ablation needs at least one"
            return
    # Arms may be asked in different ways under one name.
    evals = [f"{one.name}-{'-'.join(one.arms)}" if one.arms else one.name for one in suite.evals]
    sizes, arms = [size.name for size in suite.sizes], [arm.name for arm in suite.arms]
    for kind, names in (("sizes", sizes), ("arms", arms), ("evals", evals)):
        for place, name in enumerate(names):
            if not NAME.fullmatch(name):
                yield f"{kind}.{place}.name = {name!r}: take letters, digits, and . _ + - between them"
            if name in names[:place]:
                yield f"two {kind} are called {name}: give each its own name"
    if not NAME.fullmatch(suite.name):
        yield f"name = {suite.name!r}: take letters, digits, and . _ + - between them"
    longest = max(len(suite.run_name(arm.name, size.name, "calibration")) for arm in suite.arms for size in suite.sizes)
    if longest > LONGEST_RUN_NAME:
        yield f"a run's name would be {longest} characters long: shorten the names of suite, arms or sizes"
    for seeds in (suite.seeds, *(size.seeds for size in suite.sizes)):
        if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
            yield f"seeds = {list(seeds)}: each once, and none below 0"
    for match in dict.fromkeys((suite.match, *map(suite.match_of, suite.arms))):
        if match not in MATCHES:
            yield f"match = {match!r}: choose {' or '.join(MATCHES)}"
    asked = [name for one in suite.evals for name in one.arms]
    for name in (suite.baseline, *(name for pair in suite.comparisons for name in pair), *asked):
        if name not in arms:
            yield f"there is no arm {name!r}: there are {', '.join(arms)}"
    if suite.judge and suite.judge not in [one.name for one in suite.evals]:
        yield f"judge = {suite.judge!r} is none of the evals"
    for pair in suite.comparisons:
        if len(set(pair)) < 2:
            yield f"comparisons: {pair[0]} is compared with itself"
    for arm in suite.arms:
        for name in (*arm.sizes, *arm.at):
            if name not in sizes:
                yield f"arm {arm.name}: there is no size {name!r}: there are {', '.join(sizes)}"
        if bool(arm.start) != bool(arm.convert):
            yield f"arm {arm.name}: start and convert belong together: which run, and what `shot convert` makes of it"
        elif arm.start:
            yield from _start_problems(suite, arm)
    for size in suite.sizes:
        if bool(size.tokens) == bool(size.flops) or size.tokens < 0 or size.flops < 0:
            yield f"size {size.name}: exactly one of tokens and flops says how long its runs are"
    for key, table in (("set", suite.set), *((f"size {size.name}: set", size.set) for size in suite.sizes)):
        if "duration" in table:
            yield f"{key}.duration: how long runs are is said by tokens or flops of each size"


def _start_problems(suite: Suite, arm: Arm) -> Iterator[str]:
    """Arms that cannot begin where they say."""
    before = [one for one in suite.arms[: suite.arms.index(arm)] if one.name == arm.start]
    if not before:
        yield f"arm {arm.name}: start = {arm.start!r} is no arm further up"
        return
    for size in suite.sizes:
        here = suite.arms_at(size)
        if arm in here and not (
            before[0] in here and set(suite.seeds_of(arm, size)) <= set(suite.seeds_of(before[0], size))
        ):
            yield f"arm {arm.name}: {arm.start} has not every seed at {size.name} that it begins with there"
    if suite.match_of(arm) == "seconds":
        yield f"arm {arm.name}: seconds cannot be matched where a part of them was spent before: match flops"


def _named(items: Iterable[Any], name: str, missing: str) -> Any:
    found = {one.name: one for one in items}
    if name in found:
        return found[name]
    near = nearest(name, found)
    raise UsageError(f"{missing} {name!r}; " + (f"did you mean {near}?" if near else f"there are {', '.join(found)}"))


def _section(cls: type, table: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """The keys of one table of the file, each of its type."""
    kinds = {one.name: get_type_hints(cls)[one.name] for one in fields(cls) if one.metadata.get("key", True)}
    for name in table:
        if name in kinds:
            continue
        near = nearest(name, kinds)
        hint = f"did you mean {prefix}{near}?" if near else f"there are {', '.join(kinds)}"
        if name in recipe_keys(Recipe) and "set" in kinds:
            hint = f"keys of the recipe stand under {prefix}set"
        raise UsageError(f"{where}: unknown key {prefix}{name}; {hint}")
    return {name: _value(kinds[name], value, where, prefix + name) for name, value in table.items()}


def _value(kind: Any, value: Any, where: str, key: str) -> Any:
    """One value of the file as the dataclasses hold it."""
    if kind == dict[str, Any]:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: {key} = {value!r}: expected a table of recipe keys")
        if key.endswith(".at"):
            return {size: _value(kind, table, where, f"{key}.{size}") for size, table in value.items()}
        for name in OWNED:
            if name in value:
                raise UsageError(f"{where}: {key}.{name}: the suite gives each run its own {name}")
        return read_table(Recipe, value, where, f"{key}.")
    element = item(kind)
    if is_dataclass(element):
        if not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
            raise UsageError(f"{where}: {key}: expected tables, each under [[{key}]]")
        return tuple(element(**_section(element, one, where, f"{key}.{n}.")) for n, one in enumerate(value))
    if kind == Pairs:
        if not (isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)):
            raise UsageError(f'{where}: {key}: expected pairs of arms, such as [["a", "b"]]')
        return tuple(tuple(coerce(str, name, key, where) for name in pair) for pair in value)
    read = coerce(kind, value, key, where)
    return tuple(read) if isinstance(read, list) else read
