"""`batch(step)`: a pure function of the recipe, the prepared data and the step. No iterator state, nothing to save."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from calledshot.data.frames import denoising_of
from calledshot.data.mixture import Mixture, mixture
from calledshot.data.order import permute
from calledshot.data.plans import Plan, plan
from calledshot.data.prepared import Prepared
from calledshot.data.shards import Readers
from calledshot.objective import Batch, causal
from calledshot.objective.chance import key
from calledshot.recipe import Recipe, UsageError, batching
from calledshot.recipe.objectives import described

AHEAD = 4
"""Batches that `prefetch` keeps ready."""


@dataclass(frozen=True)
class Origin:
    """Where a piece of a row comes from."""

    source: str
    document: str
    """The document's id."""
    language: str
    start: int
    """First pair of the piece within its document."""
    pairs: int
    epoch: int
    """Which pass over the source this is, from 0."""
    denoiser: str
    """What is asked of the piece."""


class Batches:
    """The training batches of a run.

    Slots, one a sequence, are numbered through the whole run. The mixture says which source a slot draws from and how
    many sequences that source gave before; a keyed permutation of each pass turns this number into a row of the
    source's packing plan. Where the objective has several denoisers, pieces of all of them share rows, so that a pass
    over a source is one pass over its text; the next pass has a plan that gives pieces to other denoisers.
    """

    def __init__(self, prepared: Prepared, recipe: Recipe, steps: int | None = None, skips: Iterable[int] = ()) -> None:
        """`steps` is the run's length, which phases are shares of; without it `duration.tokens` gives it, where there
        is one.

        `skips`, joined with `data.skip`, are numbers of batches to leave out, as `number` gives them.
        Raises UsageError for a corpus smaller than one batch, and where `max_epochs` ends the data before `steps`.
        """
        self.prepared = prepared
        self.denoising = denoising_of(recipe, prepared.tokenizer)
        """The objective."""
        self.context = self.denoising.frame.positions
        """Positions of a sequence; the encoder's and the decoder's, where there are two."""
        self.batching = batching(recipe)
        """How many sequences each global batch has."""
        self._seed = recipe.seed
        self._variant = functools.cache(self._plan_variant)
        self.plans: tuple[Plan, ...] = tuple(self._plan(source, 0) for source in range(len(prepared.sources)))
        """Packing plan of each source's first pass."""
        self._names = tuple(source.name for source in prepared.sources)
        self._skips = tuple(sorted({*recipe.data.skip, *skips}))
        self._readers = Readers()
        self._check_size(recipe)
        if steps is None and recipe.duration.tokens:
            steps = self.batching.needed(recipe.duration.tokens)
        self._mixture = self._lay_out(recipe, steps)
        self.steps_available: int | None = None
        """Steps after which every source has reached its `max_epochs`; None where one has no bound."""
        if self._mixture.end is not None:
            numbers = self.batching.filled(self._mixture.end)
            self.steps_available = numbers - sum(skip < numbers for skip in self._skips)
            if steps is not None and self.steps_available < steps:
                raise UsageError(
                    f"data.sources: max_epochs leaves {self.batching.tokens(self.steps_available):,} tokens "
                    f"({self.steps_available:,} steps), and the run asks for {steps:,} steps: "
                    "raise max_epochs (0 sets no bound), add text, or shorten `duration`"
                )

    def _check_size(self, recipe: Recipe) -> None:
        weighted = [p for p, s in zip(self.plans, recipe.data.sources, strict=True) if s.weight or recipe.data.phases]
        rows, wanted = sum(plan.rows for plan in weighted), recipe.batch.tokens // self.context
        if rows < wanted:
            tokens = sum(plan.pairs for plan in weighted)
            raise UsageError(
                f"data.sources: {', '.join(self._names)}: {tokens:,} training tokens fill {rows} sequences of "
                f"{self.context}, less than one batch of {wanted}: lower batch.tokens or model.context, "
                "or add text"
            )

    def _lay_out(self, recipe: Recipe, steps: int | None) -> Mixture:
        sources = recipe.data.sources
        own = [source.weight for source in sources]
        phases = [(0, own)]
        if recipe.data.phases and steps is None:
            raise UsageError("data.phases: their start is a share of the run, and its number of steps is not known yet")
        for phase in sorted(recipe.data.phases, key=lambda phase: phase.start):
            weights = [phase.weights.get(name, weight) for name, weight in zip(self._names, own, strict=True)]
            first = self.batching.before(self.batching.reached(phase.start, steps or 0))
            # A phase that begins where the one before it does takes its place.
            phases = [kept for kept in phases if kept[0] < first]
            phases.append((first, weights))
        capacities = [
            self._rows_of(number, source.max_epochs) if source.max_epochs else None
            for number, source in enumerate(sources)
        ]
        return mixture(phases, capacities)

    def _plan_variant(self, source: int, variant: int) -> Plan:
        return plan(self.prepared, self.prepared.sources[source], self.denoising, variant)

    def _plan(self, source: int, epoch: int) -> Plan:
        """The plan of a pass over a source; the seed decides with which variant they begin."""
        return self._variant(source, (self._seed + epoch) % self.denoising.variants)

    def _pass(self, source: int, index: int) -> tuple[int, int]:
        """(pass over a source, row within it) of the row of this number through all passes."""
        period, before = self.denoising.variants, 0
        for epoch in range(period):
            rows = self._plan(source, epoch).rows
            if index < before + rows:
                return epoch, index - before
            before += rows
        cycles, index = divmod(index, before)
        epoch, place = self._pass(source, index)
        return cycles * period + epoch, place

    def _rows_of(self, source: int, epochs: float) -> int:
        """Rows of so many passes over a source."""
        period = self.denoising.variants
        if period == 1:
            return math.floor(epochs * self.plans[source].rows)
        whole = math.floor(epochs)
        rows = [self._plan(source, epoch).rows for epoch in range(min(whole + 1, period))]
        cycles, left = divmod(whole, period)
        return cycles * sum(rows) + sum(rows[:left]) + math.floor((epochs - whole) * rows[left])

    @property
    def packing_loss(self) -> float:
        """Share of the positions that hold padding, in one pass over every source."""
        positions = sum(plan.rows for plan in self.plans) * self.context
        return 1 - sum(plan.filled for plan in self.plans) / positions

    def number(self, step: int) -> int:
        """The number that a step's batch has in a run without skips: what `data.skip` and skips.jsonl name."""
        number = step
        for skip in self._skips:
            if skip > number:
                break
            number += 1
        return number

    def batch(self, step: int) -> Batch:
        """The global batch of a step, from 0; B = batch.tokens / model.context rows, fewer during `batch.ramp`."""
        return self.rows(step, 0, self.size(step))

    def size(self, step: int) -> int:
        """Sequences in the global batch of a step, B."""
        return self.batching.rows(self.number(step))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` of a step's batch: a rank's share, the same rows however many ranks there are."""
        located = [self._locate(step, row) for row in range(start, stop)]
        rows = [self._read(source, epoch, row) for source, epoch, row in located]
        sources = [source for source, _, _ in located]
        if self.denoising.plain and self.denoising.denoisers[0].kind == "causal":
            return causal(rows, sources, self.context, self.prepared.tokenizer.pad)
        tasks = [self._plan(source, epoch).tasks(self._readers, row) for source, epoch, row in located]
        keys = [key("objective", self._seed, self._names[source], *place) for source, *place in located]
        return self.denoising.batch(rows, tasks, keys, sources)

    def _locate(self, step: int, row: int) -> tuple[int, int, int]:
        """(source, epoch, row of the source's plan) of a row of a step's batch."""
        slot = self.batching.before(self.number(step)) + row
        if self._mixture.end is not None and slot >= self._mixture.end:
            raise UsageError(
                f"data.sources: max_epochs is reached by every source before step {step}; raise it, or add text"
            )
        source, index = self._mixture.locate(slot)
        epoch, place = self._pass(source, index)
        size = self._plan(source, epoch).rows
        return source, epoch, permute(place, size, seed=self._seed, source=self._names[source], epoch=epoch)

    def _read(self, source: int, epoch: int, row: int) -> list[np.ndarray]:
        shards = self.prepared.sources[source].train.shards
        dtype = self.prepared.dtype
        width = dtype.itemsize
        pieces = []
        for shard, pairs, offset in self._plan(source, epoch).row(self._readers, row):
            path = self.prepared.path / f"{shards[shard].stem}.bin"
            pieces.append(np.frombuffer(self._readers.read(path, width * offset, width * (pairs + 1)), dtype))
        return pieces

    def progress(self, step: int) -> dict[str, float]:
        """Passes over each source, by name, that the batches before `step` have made."""
        counts = self._mixture.counts(self.batching.before(self.number(step)))
        passes = {}
        for source, count in enumerate(counts):
            if self.plans[source].rows:
                epoch, place = self._pass(source, count)
                rows = self._plan(source, epoch).rows
                passes[self._names[source]] = (epoch * rows + place) / rows
        return passes

    def origins(self, step: int) -> list[list[Origin]]:
        """The documents in each row of a step's batch, in the order of `Batch.documents`. Reads whole indexes: for
        people."""
        indexes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, list[str]]] = {}
        rows = []
        for row in range(self.size(step)):
            source, epoch, number = self._locate(step, row)
            origins = []
            made = self._plan(source, epoch)
            tasks = made.tasks(self._readers, number).tolist()
            placed = made.row(self._readers, number)
            for (shard_number, pairs, offset), task in zip(placed, tasks, strict=True):
                shard = self.prepared.sources[source].train.shards[shard_number]
                known = indexes.get((source, shard_number))
                if known is None:
                    index = shard.index(self.prepared.path)
                    known = index, np.cumsum(index["ids"]) - index["ids"], shard.names(self.prepared.path)
                    indexes[source, shard_number] = known
                index, starts, names = known
                document = int(np.searchsorted(starts, offset, side="right")) - 1
                language = shard.languages[int(index["language"][document])]
                first = offset - int(starts[document])
                asked = described(self.denoising.denoisers[task])
                origins.append(Origin(self._names[source], names[document], language, first, pairs, epoch, asked))
            rows.append(origins)
        return rows

    def prefetch(
        self, start: int, stop: int | None = None, share: Callable[[int], tuple[int, int]] | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from `start` on, read by a thread some steps ahead; `share` gives the rows that are a rank's of
        so many. Raises what reading raises."""

        def read(step: int) -> Batch:
            rows = self.size(step)
            return self.rows(step, *(share(rows) if share else (0, rows)))

        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ready = []
            step = start
            while stop is None or step < stop or ready:
                while len(ready) < AHEAD and (stop is None or step < stop):
                    ready.append((step, pool.submit(read, step)))
                    step += 1
                number, future = ready.pop(0)
                yield number, future.result()
