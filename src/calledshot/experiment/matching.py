"""From a suite to recipes that really are matched, by `recipe.cost` alone, and what then is not matched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from calledshot.recipe import Cost, Recipe, UsageError, check, cost, difference, from_dict, load_recipe, shape, to_dict
from calledshot.recipe.conversion import converted
from calledshot.recipe.cost import DTYPE_BYTES, activation_bytes
from calledshot.recipe.load import is_path
from calledshot.recipe.reading import merge, override, split_overrides
from calledshot.recipe.schema import Duration, Model

from .suite import OWNED, Arm, Size, Suite

TOLERANCE = 0.01
"""How far from the baseline's a matched quantity may be, as a share of it."""
ADJUST: dict[str, tuple[str, ...]] = {
    "parameters": ("model.hidden", "model.layers", "model.width"),
    "non-embedding": ("model.hidden", "model.layers", "model.width"),
    "active": ("model.hidden", "model.layers", "model.width"),
    "flops": ("duration.tokens",),
    "seconds": ("duration.tokens",),
    "none": (),
}
"""Keys that are moved to match where neither suite nor arm names any, in the order in which they are tried."""
FIXED = ("heads", "kv_heads", "head_width", "context", "encoder_context", "encoder_pooling", "top_k")
"""Sizes of the model that are not moved: they change more than a size."""
WEIGHTLESS = ("balance_weight", "router_z_loss", "exportable_to")
"""Keys of the model that its weights do not know of, so that they may change on the way."""
GRAINS = (8, 1)
"""Widths are tried in multiples of the first, which processors like, then of the second."""
LARGEST = 1 << 20
PASS = 4096
"""Positions of the forward and backward pass whose memory is compared: as many for every arm, whatever its rows."""

Rates = Mapping[tuple[str, str], float]
"""Measured training speed by (arm, size), in tokens a second."""


@dataclass(frozen=True)
class Adjusted:
    """A key that was moved so that an arm matches."""

    key: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.key} {self.before:,} → {self.after:,}"


@dataclass(frozen=True)
class Cell:
    """One arm at one size: a recipe without its seed, matched to the baseline's."""

    arm: Arm
    size: Size
    match: str
    recipe: Recipe
    adjusted: Adjusted | None
    pending: bool
    """Its tokens wait for a measurement: it is matched by seconds, and its speed or the baseline's is not known yet."""
    changed: tuple[str, ...]
    """Recipe keys that the arm changes against the baseline, the one moved to match left out."""
    start: Cell | None = None
    """Whose run its own begins with."""

    @cached_property
    def cost(self) -> Cost:
        """Of its own run, by arithmetic."""
        return cost(self.recipe)

    @property
    def tokens(self) -> int:
        """Of its own run and of what it begins with."""
        return (self.cost.tokens or 0) + (self.start.tokens if self.start else 0)

    @property
    def flops(self) -> float:
        """Of its own run and of what it begins with."""
        return (self.cost.flops or 0.0) + (self.start.flops if self.start else 0.0)

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients and optimizer, and of the activations of a pass over `PASS` positions."""
        parallel = self.recipe.parallel
        kept = activation_bytes(self.cost.shape, PASS, DTYPE_BYTES[parallel.dtype], parallel.compile != "off")
        return self.cost.bytes.fixed + kept


QUANTITIES: dict[str, Callable[[Cell], float]] = {
    "parameters": lambda cell: cell.cost.parameters.total,
    "non-embedding": lambda cell: cell.cost.parameters.non_embedding,
    "active": lambda cell: cell.cost.parameters.active,
    "FLOPs a token": lambda cell: cell.cost.flops_per_token.total,
    "tokens": lambda cell: cell.tokens,
    "FLOPs": lambda cell: cell.flops,
    "memory": lambda cell: cell.memory,
    "KV bytes": lambda cell: cell.cost.bytes.kv_cache_per_token,
}
"""What arms can differ in, by arithmetic."""


def unmatched(cell: Cell, baseline: Cell) -> dict[str, float]:
    """Quantities in which a cell differs from the baseline's by more than `TOLERANCE`, as a share of the baseline's."""
    shares = {
        name: read(cell) / against - 1 if (against := read(baseline)) else 0.0 for name, read in QUANTITIES.items()
    }
    return {name: share for name, share in shares.items() if abs(share) > TOLERANCE}


def resolve(suite: Suite, rates: Rates | None = None) -> dict[tuple[str, str], Cell]:
    """Every cell of a suite by (arm, size), sizes in the suite's order. UsageError names the arm that cannot be matched
    and the keys that were tried."""
    return {(cell.arm.name, cell.size.name): cell for size in suite.sizes for cell in resolve_size(suite, size, rates)}


def resolve_size(suite: Suite, size: Size, rates: Rates | None = None) -> Iterator[Cell]:
    """The cells of one size, the baseline first."""
    reference = suite.reference
    duration = {"tokens": size.tokens} if size.tokens else {"flops": size.flops}
    target = _asked(suite, size, reference, duration)
    baseline = Cell(reference, size, suite.match_of(reference), target, None, False, ())
    yield baseline
    found = {reference.name: baseline}
    for arm in suite.arms_at(size):
        if arm is not reference:
            asked = _asked(suite, size, arm, {"tokens": target.duration.tokens}, found.get(arm.start))
            changed = tuple(key for key, _, _ in difference(target, asked, identity_only=True))
            cell = Cell(arm, size, suite.match_of(arm), asked, None, False, changed, found.get(arm.start))
            found[arm.name] = _matched(suite, cell, baseline, rates or {})
            yield found[arm.name]


def _where(suite: Suite, size: Size, arm: Arm) -> str:
    return f"suite {suite.name}, arm {arm.name}, size {size.name}"


def _asked(suite: Suite, size: Size, arm: Arm, duration: dict[str, Any], start: Cell | None = None) -> Recipe:
    """The recipe that the tables and the command line ask for, its length in tokens, before anything is moved. An arm
    that begins with another's run has that one's recipe, and the model that it is converted to."""
    reference, where = suite.recipe, _where(suite, size, arm)
    if is_path(reference):
        reference = str(suite.folder / reference)
    asked: tuple[dict[str, Any], ...] = (arm.set, arm.at.get(size.name, {}))
    if start is None:
        data, asked = to_dict(load_recipe(reference, checked=False)), (suite.set, size.set, *asked)
    else:
        data = to_dict(replace(start.recipe, model=_converted(start, arm, where)))
    data |= {"name": "", "seed": 0, "duration": duration}
    for table in asked:
        data = merge(data, table)
    pairs = split_overrides(suite.overrides)
    if any(key.split(".")[0] == "duration" for key, _ in pairs):
        data["duration"] = {}
    for key, text in pairs:
        if key in OWNED:
            raise UsageError(f"{key}: the suite gives each run its own {key}; --name NAME renames the suite")
        override(data, key, text)
    recipe = from_dict(data, where)
    if start is not None:
        _keeps_shape(recipe, _converted(start, arm, where), where)
    tokens = cost(recipe).tokens
    if tokens is None:
        raise UsageError(
            f"{where}: duration.minutes: arms are compared by tokens or FLOPs; match = seconds is for time"
        )
    return recipe if recipe.duration.tokens else replace(recipe, duration=Duration(tokens=tokens))


def _converted(start: Cell, arm: Arm, where: str) -> Model:
    """The model that an arm begins with."""
    try:
        return converted(start.recipe.model, arm.convert)
    except UsageError as error:
        raise UsageError(f"{where}: convert: {error}") from error


def _keeps_shape(recipe: Recipe, made: Model, where: str) -> None:
    """UsageError where an arm asks for another model than it begins with."""
    asked = replace(recipe.model, **{key: getattr(made, key) for key in WEIGHTLESS})
    if shape(asked) != shape(made):
        before = replace(recipe, model=made)
        key, value, _ = difference(before, replace(recipe, model=asked))[0]
        raise UsageError(f"{where}: {key} is {value!r} after `shot convert`: a converted run keeps its shape")


def _matched(suite: Suite, cell: Cell, baseline: Cell, rates: Rates) -> Cell:
    """The cell with one key moved, if need be, so that it matches the baseline."""
    match, where = cell.match, _where(suite, cell.size, cell.arm)
    if match == "none":
        return cell
    keys = cell.arm.adjust or suite.adjust or ADJUST[match]
    if match == "seconds":
        if keys != ADJUST[match]:
            raise UsageError(f"{where}: match = seconds moves {ADJUST[match][0]}, not {', '.join(keys)}")
        return _matched_by_seconds(cell, baseline, rates)
    read = QUANTITIES[{"flops": "FLOPs"}.get(match, match)]
    target = read(baseline)
    asked = read(cell) / target - 1
    if abs(asked) <= TOLERANCE:
        return cell
    tried = [f"as it is: {asked:+.1%}"]
    for key in keys:
        if key in cell.changed:
            tried.append(f"{key} is what the arm changes")
            continue
        value = _nearest(cell, key, read, target, where)
        moved = moved_to(cell, key, value)
        reached = read(moved) / target - 1
        if abs(reached) <= TOLERANCE:
            check(moved.recipe, where)
            return replace(moved, adjusted=Adjusted(key, _present(cell, key), value))
        tried.append(f"{key} = {value:,}: {reached:+.1%}")
    raise UsageError(
        f"{where}: is not matched by {match} within {TOLERANCE:.0%} ({'; '.join(tried)}): let adjust name another key, "
        "or give the arm another match"
    )


def _matched_by_seconds(cell: Cell, baseline: Cell, rates: Rates) -> Cell:
    """The cell with as many tokens as take the baseline's time at the speeds measured."""
    if cell.recipe.parallel.compile == "auto":
        raise UsageError(
            "set.parallel.compile: say on or off where arms are matched by seconds; what auto takes for the short run "
            "that measures an arm's speed need not be what it takes for the long one"
        )
    own, against = (rates.get((one.arm.name, one.size.name)) for one in (cell, baseline))
    if not own or not against:
        return replace(cell, pending=True)
    before, batch = cell.cost.tokens or 0, cell.recipe.batch.tokens
    tokens = (baseline.cost.tokens or 0) * own / against
    after = max(1, round(tokens / batch)) * batch
    adjusted = Adjusted("duration.tokens", before, after) if after != before else None
    return replace(moved_to(cell, "duration.tokens", after), adjusted=adjusted)


def _nearest(cell: Cell, key: str, read: Callable[[Cell], float], target: float, where: str) -> int:
    """The value of `key` that brings `read` nearest to `target`; what is read must not fall as the key grows."""
    section, _, leaf = key.partition(".")
    model = cell.recipe.model

    def off(value: int) -> float:
        return read(moved_to(cell, key, value)) - target

    if key == "duration.tokens":
        batch = cell.recipe.batch.tokens
        first, second = off(batch), off(2 * batch)
        return max(1, round(1 - first / (second - first))) * batch if second > first else batch
    if section != "model" or not isinstance(getattr(model, leaf, None), int) or leaf in FIXED:
        raise UsageError(f"{where}: adjust = {key!r}: only duration.tokens and sizes of the model can be moved")
    found = []
    grains = (1,) if leaf.endswith("layers") else GRAINS
    if leaf == "width" and not model.head_width:
        grains = (2 * model.heads,)  # heads of even width
    for grain in grains:
        low, high = 0, 1  # off(low * grain) < 0 <= off(high * grain), or low is 0
        while off(high * grain) < 0 and high * grain < LARGEST:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if off(middle * grain) < 0 else (low, middle)
        found += [value * grain for value in (low, high) if value]
        best = min(found, key=lambda value: abs(off(value)))
        if abs(off(best)) <= TOLERANCE * target:
            break
    return best


def moved_to(cell: Cell, key: str, value: int) -> Cell:
    """The cell with one key of its recipe set; `duration.tokens` replaces any other duration."""
    section, leaf = key.split(".")
    recipe = cell.recipe
    if section == "duration":
        return replace(cell, recipe=replace(recipe, duration=Duration(**{leaf: value})))
    return replace(cell, recipe=replace(recipe, **{section: replace(getattr(recipe, section), **{leaf: value})}))


def _present(cell: Cell, key: str) -> int:
    """The value of a key before it is moved, zeros resolved."""
    section, leaf = key.split(".")
    if section == "duration":
        return cell.cost.tokens or 0
    return int(getattr(cell.cost.shape, leaf))
