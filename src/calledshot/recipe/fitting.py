"""What to set so that a run fits into the memory there is, by arithmetic: `memory` for people, `layout` for a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from .activations import Setting
from .cost import cost
from .derived import shape
from .errors import UsageError
from .layout import Layout, layouts
from .memory import Footprint, footprint, setting
from .schema import Recipe

RESERVE = 0.1
"""Share of a device's memory left to the allocator, the kernels and the communication."""
ENOUGH = {"cuda": 4096, "cpu": 1024}
"""Positions of a micro-batch that give the device enough to do: for more, nothing is computed again and no weights are
shared."""
QUICKEST = {"cuda": 65_536, "cpu": 4096}
"""Positions beyond which a micro-batch is no quicker: a GPU is full, a CPU's caches are."""


@dataclass(frozen=True)
class Option:
    """One way to run, with the largest micro-batch of use that fits; with one sequence where none does."""

    layout: Layout
    activation_checkpointing: str
    micro_tokens: int
    footprint: Footprint
    fits: bool


@dataclass(frozen=True)
class Memory:
    """What fits, and what to take."""

    ranks: int
    memory: int
    """Of one rank."""
    usable: int
    """`memory` without `RESERVE`."""
    chosen: Option
    """What to take; where nothing fits, what lacks least."""
    options: tuple[Option, ...]
    """It and others: fewer and more ranks to a copy of the weights, more and less computed again."""
    settings: tuple[str, ...]
    """What to take, as overrides of the recipe."""
    staged: int
    """Bytes of host memory that a rank's share of a checkpoint takes while it is written in the background."""

    @property
    def fits(self) -> bool:
        """Whether anything does."""
        return self.chosen.fits

    @property
    def micro_tokens(self) -> int | None:
        """Of what to take; None where not even one sequence fits."""
        return self.chosen.micro_tokens if self.fits else None

    @property
    def needed(self) -> int:
        """Bytes that a rank holds at the fullest moment."""
        return self.chosen.footprint.peak


def memory(recipe: Recipe, ranks: int = 1, memory: int = 80 * 2**30, device: str = "cuda") -> Memory:
    """What fits into `memory` bytes on each of `ranks` ranks, `cuda` or `cpu` devices, and which setting to take:
    weights shared by as few ranks, and as little computed again, as leave room for micro-batches that keep the device
    busy; sharing is the cheaper of the two. What the recipe sets itself is kept.

    Raises: `UsageError` where no layout of so many ranks is possible.
    """
    usable, how = int(memory * (1 - RESERVE)), setting(recipe, device)
    modes = ("none", "selective", "full") if how.checkpointing == "none" else (how.checkpointing,)
    possible = layouts(recipe, ranks)
    grid = [[_option(recipe, one, usable, replace(how, checkpointing=mode)) for one in possible] for mode in modes]
    chosen = _first([one for row in grid for one in row], recipe, device)
    column = possible.index(chosen.layout)
    shown = (*grid[0], *(row[column] for row in grid[1:]))
    keys = {"shard": chosen.layout.shard} if ranks > 1 else {}
    keys["micro_tokens"] = chosen.micro_tokens
    keys["activation_checkpointing"] = chosen.activation_checkpointing
    asked = recipe.parallel
    settings = tuple(f"parallel.{key}={value}" for key, value in keys.items() if value != getattr(asked, key))
    staged = cost(recipe).bytes.checkpoint // ranks if recipe.checkpoint.asynchronous else 0
    return Memory(ranks, memory, usable, chosen, shown, settings, staged)


def enough_ranks(recipe: Recipe, ranks: int, each: int, device: str = "cuda") -> int | None:
    """`ranks`, doubled until everything fits into `each` bytes; None where a batch has not so many sequences."""
    with suppress(UsageError):
        while not memory(recipe, ranks, each, device).fits:
            ranks *= 2
        return ranks
    return None


def layout(recipe: Recipe, ranks: int, memory: int | None = None, device: str = "cuda") -> Layout:
    """The layout of `ranks` ranks that the recipe's `parallel` asks for.

    Where it leaves `shard` open, a copy of the weights is shared by as few ranks as need to for everything to fit into
    `memory` bytes on each; by none where `memory` is not known.

    Raises: `UsageError` where the ranks do not come out even, or the model cannot be cut so.
    """
    possible = layouts(recipe, ranks)
    if memory is None or len(possible) == 1:
        return possible[0]
    usable, how = int(memory * (1 - RESERVE)), setting(recipe, device)
    return _first([_option(recipe, one, usable, how) for one in possible], recipe, device).layout


def _first(options: list[Option], recipe: Recipe, device: str) -> Option:
    """The first that leaves room for enough, else for anything; the smallest where none fits."""
    whole = recipe.batch.tokens // options[0].layout.data
    fitting = [one for one in options if one.fits]
    busy = [one for one in fitting if one.micro_tokens >= min(whole, ENOUGH[device])]
    return (busy or fitting or [min(options, key=lambda one: one.footprint.peak)])[0]


def largest_micro_tokens(recipe: Recipe, layout: Layout, usable: int, how: Setting) -> int | None:
    """Positions of the largest micro-batch with which a rank holds at most `usable` bytes: whole sequences, a divisor
    of the batch and no larger than is of use; None where not even one sequence fits.
    """
    row = shape(recipe.model).row_positions
    fitting = [
        rows for rows in _sizes(recipe, layout, how) if footprint(recipe, layout, rows * row, how).peak <= usable
    ]
    return max(fitting) * row if fitting else None


def _option(recipe: Recipe, layout: Layout, usable: int, how: Setting) -> Option:
    found = largest_micro_tokens(recipe, layout, usable, how)
    tokens = found or min(_sizes(recipe, layout, how)) * shape(recipe.model).row_positions
    return Option(layout, how.checkpointing, tokens, footprint(recipe, layout, tokens, how), found is not None)


def _share(recipe: Recipe, layout: Layout) -> int:
    """Sequences of a batch that are one rank's."""
    return -(-recipe.batch.tokens // shape(recipe.model).row_positions // layout.data)


def _sizes(recipe: Recipe, layout: Layout, how: Setting) -> Iterator[int]:
    """Sequences that a micro-batch may have: what the recipe says, or any number that divides the batch."""
    row = shape(recipe.model).row_positions
    rows, most = recipe.batch.tokens // row, max(1, QUICKEST[how.device] * layout.context // row)
    if recipe.parallel.micro_tokens:
        yield min(recipe.parallel.micro_tokens // row, _share(recipe, layout))
        return
    yield from (n for n in range(1, min(_share(recipe, layout), most) + 1) if rows % n == 0)
