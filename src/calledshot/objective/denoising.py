"""Denoising: a piece of a document becomes inputs, which have gaps or break off, and targets, which fill them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calledshot.objective.batch import Batch
from calledshot.objective.chance import uniform, words
from calledshot.objective.layout import Examples, Frame, Specials, lay_out
from calledshot.objective.spans import ranges, roll, span_counts, span_mask
from calledshot.recipe.schema import Denoiser

SHORTENED = 1 / 16
"""Share of its length that a piece may lose so that more of them fit in a row."""


def examples(
    ids: np.ndarray,
    lengths: np.ndarray,
    taken: np.ndarray,
    spanned: np.ndarray,
    modes: np.ndarray,
    two_way: np.ndarray,
    specials: Specials,
) -> Examples:
    """Split P pieces of text into what is given and what is predicted.

    `ids` int32 (N,) are the pieces one after another, `lengths` (P,) of them each; `taken` bool (N,) says which ids
    become targets, never a piece's first. `modes` (P,) is the id put before a piece's inputs, -1 for none.

    Where `spanned` (P,) is false the targets are the taken ids as they are: they end with the end token only where the
    document does. Where it is true the k-th run of taken ids is replaced in the inputs by the k-th sentinel, and the
    targets are each sentinel with its run, then the end token: the mark that nothing is left to fill in, as T5's code
    appends its EOS; the paper's figure closes with one more sentinel. Such a piece must not hold the document's end.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    opens = taken & spanned[owner]
    opens[1:] &= ~taken[:-1]
    firsts = np.cumsum(lengths) - lengths
    number = np.cumsum(opens)
    number = number - (number[firsts] - opens[firsts])[owner] - 1
    sentinels = np.asarray(specials.sentinels, np.int32)[number[opens]]

    # Room before a piece's first input for its mode token; a taken id leaves none but a sentinel's.
    room = np.where(taken, opens, 1)
    with_mode = modes >= 0
    before = room.copy()
    before[firsts] += with_mode
    ends = np.cumsum(before)
    inputs = np.empty(int(ends[-1]) if len(ends) else 0, np.int32)
    inputs[ends[~taken] - 1] = ids[~taken]
    inputs[ends[opens] - 1] = sentinels
    inputs[(ends[firsts] - 2)[with_mode]] = modes[with_mode]
    input_lengths = _sums(before, firsts)

    room = taken.astype(np.int64) + opens
    closing = np.zeros_like(room)
    lasts = firsts + lengths - 1
    closing[lasts] = spanned
    ends = np.cumsum(room + closing)
    targets = np.empty(int(ends[-1]) if len(ends) else 0, np.int32)
    targets[(ends - closing)[taken] - 1] = ids[taken]
    targets[(ends - closing)[opens] - 2] = sentinels
    targets[ends[lasts[spanned]] - 1] = specials.end
    target_lengths = _sums(room + closing, firsts)
    weights = np.ones(len(targets), np.float32)
    return Examples(inputs, input_lengths, targets, target_lengths, weights, two_way)


def _sums(values: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, firsts).astype(np.int64) if len(firsts) else np.zeros(0, np.int64)


def _couples(spare: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64: the longer and the shorter piece of each couple: in each row the prefixes by how much they have to spare,
    the first with the second, the third with the fourth; the last of an odd number stays alone."""
    order = np.lexsort((-spare, rows))
    order = order[spare[order] >= 0]
    ranks = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])
    shorter = np.flatnonzero(ranks % 2)
    return order[shorter - 1], order[shorter]


@dataclass(frozen=True)
class Denoising:
    """A mixture of denoisers in one topology: how long their pieces are, and what becomes of them.

    A piece is a run of a document's (input, target) pairs, as in the causal objective: L pairs are L + 1 ids, the first
    of which, the begin token or the id before the piece, is given and never predicted. So every token of every document
    is text of exactly one piece in a pass over the data.

    - `causal`: all but the first id are targets.
    - `prefix`: of n ids the first s are inputs, s uniform from max(1, round((1 - 2 rate) (n - 1))) to n - 1 (T5's
      random_prefix_noise_mask), whatever else is in the row.
    - `span`: the first id stays and the others are corrupted (`span_counts`, `span_mask`), which T5 does with the first
      one too; the document's end token, where the piece has it, is left out, since the targets have one of their own.
      With `roll` the corruption is rotated by any number of tokens; a run that this parts in two gets two sentinels,
      where T5's code gives the targets one fewer than the inputs.

    An encoder and a decoder are filled by pieces whose splits are drawn only when a batch is, and have to hold any that
    may be. So prefixes share rows as couples: where the longer one's split is early in its range, the other's is late
    in its own by as much. Each split is uniform, and what the two take of either stack is known before they are drawn.

    The sentinels never run out: a piece is cut where it would need more than there are.
    """

    denoisers: tuple[Denoiser, ...]
    frame: Frame

    @property
    def plain(self) -> bool:
        """Whether rows are packed as for the causal objective: as many pairs as positions."""
        (one, *others) = self.denoisers
        return not others and one.kind != "span" and not one.mode and not self.frame.encoder_context

    @property
    def key(self) -> str:
        """A hash of all that decides how long pieces are and which denoiser each is for."""
        frame = [self.frame.context, self.frame.encoder_context, len(self.frame.specials.sentinels), self.frame.pooling]
        parts = [[one.kind, one.weight, one.rate, one.mean_span, one.roll, bool(one.mode)] for one in self.denoisers]
        # Rows of plans that were packed before there were couples may overflow.
        parts += [["couples"]] if self.coupled else []
        return hashlib.sha256(json.dumps([frame, parts, self.cuts.tolist()]).encode()).hexdigest()

    @property
    def coupled(self) -> bool:
        """Whether prefixes are packed as couples: where there is an encoder."""
        return bool(self.frame.encoder_context) and any(one.kind == "prefix" for one in self.denoisers)

    @property
    def variants(self) -> int:
        """Ways of giving pieces to denoisers; each pass over the data takes the next, and then the first again."""
        return len(self.denoisers)

    def choose(self, documents: np.ndarray, ordinals: np.ndarray, variant: int) -> np.ndarray:
        """int64 (P,): number of the denoiser that the piece of each ordinal within each document is for.

        Each piece has a place on a circle on which each denoiser has an arc as long as its weight; from one variant to
        the next all places move on by 1 / `variants`, so that a piece comes to many denoisers before the same again.
        """
        weights = np.array([one.weight for one in self.denoisers])
        shares = np.cumsum(weights / weights.sum())
        place = (uniform(words(documents, ordinals)) + variant / self.variants) % 1.0
        return np.minimum(np.searchsorted(shares, place, side="right"), len(weights) - 1)

    @functools.cached_property
    def cuts(self) -> np.ndarray:
        """(J,) int64: pairs of the longest piece of each denoiser.

        That is the longest which fits in a row whatever chance says, or one up to `SHORTENED` shorter where more of
        them then fill a row. Of coupled prefixes two have to fit.
        """
        pairs = np.arange(1, self.frame.positions + 1)
        cuts = []
        for number in range(len(self.denoisers)):
            tasks = np.full(len(pairs), number)
            inputs, targets = self._largest(tasks, pairs)
            fits = self.frame.fits(inputs, targets)
            fits &= self._runs(tasks, pairs)[1] <= len(self.frame.specials.sentinels)
            longest = int(pairs[fits].max())
            near = slice(longest - int(longest * SHORTENED) - 1, longest)
            in_a_row = self.frame.capacity // self.frame.places(inputs[near], targets[near])
            cuts.append(int(pairs[near][::-1][np.argmax((in_a_row * pairs[near])[::-1])]))
        return np.array(cuts, np.int64)

    def places(self, tasks: np.ndarray, pairs: np.ndarray, last: np.ndarray) -> np.ndarray:
        """int64 (P,): room that pieces of so many pairs take of a row's `frame.capacity`.

        `last` (P,) says which pieces end their document. A coupled prefix counts as its mean length, about half of what
        it takes with another as long; `units` has what couples take.
        """
        low, high = self._splits(tasks, pairs + 1)
        if not self.coupled:
            return self.frame.places(*self._sizes(tasks, pairs, last, low, low))
        middle = (low + high) // 2
        return self.frame.places(*self._sizes(tasks, pairs, last, low + high - middle, middle))

    def units(
        self, tasks: np.ndarray, pairs: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order, counts, places) of the U units of pieces, couples of prefixes and single ones, that share a row.

        `order` int64 (P,) are the pieces, those of a unit together, `counts` (U,) how many a unit has, and `places`
        (U,) what room it takes of a row's `frame.capacity`. Units whose places add up to no more fit in a row: `batch`
        couples all prefixes of a row by their length, and no other couples take less.
        """
        each = np.arange(len(tasks))
        if not self.coupled:
            return each, np.ones_like(each), self.places(tasks, pairs, last)
        low, high = self._splits(tasks, pairs + 1)
        longer, shorter = _couples(self._spare(tasks, pairs), np.zeros_like(tasks))
        unit, second = each.copy(), np.zeros(len(tasks), bool)
        unit[shorter], second[shorter] = longer, True
        order = np.lexsort((second, unit))
        firsts = np.flatnonzero(~second[order])
        # The longer may take all that it can of either stack; the shorter then takes the least that it can.
        given, kept = np.where(second, low, high), np.where(second, high, low)
        inputs, targets = self._sizes(tasks, pairs, last, given, kept)
        inputs, targets = _sums(inputs[order] + self.frame.aside, firsts), _sums(targets[order], firsts)
        return order, np.diff(firsts, append=len(order)), self.frame.places(inputs - self.frame.aside, targets)

    def filled(self, tasks: np.ndarray, pairs: np.ndarray, last: np.ndarray) -> np.ndarray:
        """int64 (P,): positions that such pieces take; of rotated spans, as many as they may."""
        low, _ = self._splits(tasks, pairs + 1)
        return self.frame.filled(*self._sizes(tasks, pairs, last, low, low))

    def batch(
        self,
        rows: Sequence[Sequence[np.ndarray]],
        tasks: Sequence[Sequence[int] | np.ndarray],
        keys: Sequence[int],
        sources: Sequence[int],
    ) -> Batch:
        """The batch of B rows: `rows` holds the ids of each row's pieces, `tasks` the denoiser of each piece.

        `keys` are 64 bits for each row: all that is left to chance depends on them and on the row alone.
        """
        counts = np.array([len(row) for row in rows], np.int64)
        ids = np.concatenate([piece for row in rows for piece in row]).astype(np.int32)
        lengths = np.array([len(piece) for row in rows for piece in row], np.int64)
        task = np.concatenate([np.asarray(row, np.int64) for row in tasks])
        row_lengths = np.array([sum(map(len, row)) for row in rows], np.int64)
        key = np.repeat(np.array(keys, np.uint64), row_lengths)
        numbers = words(key, ranges(np.zeros_like(row_lengths), row_lengths))
        firsts = np.cumsum(lengths) - lengths
        chance = uniform(numbers[firsts])

        spanned = self._column("kind", task) == "span"
        lasts = firsts + lengths - 1
        closed = spanned & (ids[lasts] == self.frame.specials.end)
        kept = np.ones(len(ids), bool)
        kept[lasts[closed]] = False
        ids, numbers = ids[kept], numbers[kept]
        pairs = lengths - 1
        lengths = lengths - closed
        within = ranges(np.zeros_like(lengths), lengths)
        taken = within >= np.repeat(self._choose_splits(task, pairs, counts, chance), lengths)
        corrupted = np.repeat(spanned, lengths) & (within > 0)
        taken[corrupted] = self._corrupt(task[spanned], lengths[spanned] - 1, chance[spanned], numbers[corrupted])
        modes = np.array([self.frame.specials.modes.get(one.mode, -1) for one in self.denoisers], np.int64)[task]
        two_way = self._column("kind", task) != "causal"
        made = examples(ids, lengths, taken, spanned, modes, two_way, self.frame.specials)
        return lay_out(made, counts, sources, self.frame)

    def _corrupt(self, tasks: np.ndarray, lengths: np.ndarray, chance: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """bool: which tokens of pieces of so many tokens are taken out."""
        taken, spans = span_counts(lengths, self._column("rate", tasks), self._column("mean_span", tasks))
        mask = span_mask(lengths, taken, spans, numbers)
        turns = np.where(self._column("roll", tasks), (chance * lengths).astype(np.int64), 0)
        return roll(mask, lengths, turns) if turns.any() else mask

    def _choose_splits(
        self, tasks: np.ndarray, pairs: np.ndarray, counts: np.ndarray, chance: np.ndarray
    ) -> np.ndarray:
        """int64 (P,): ids that are inputs, of the pieces whose kind is `prefix` or `causal`."""
        low, high = self._splits(tasks, pairs + 1)
        if not self.coupled:
            return low + (chance * (high - low + 1)).astype(np.int64)
        longer, shorter = _couples(self._spare(tasks, pairs), np.repeat(np.arange(len(counts)), counts))
        shared = chance.copy()
        shared[shorter] = chance[longer]
        beyond = (shared * (high - low + 1)).astype(np.int64)
        splits = low + beyond
        splits[shorter] = (high - beyond)[shorter]
        return splits

    def _spare(self, tasks: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """int64 (P,): ids of a prefix that are inputs or targets as chance says; -1 for other kinds."""
        low, high = self._splits(tasks, pairs + 1)
        return np.where(self._column("kind", tasks) == "prefix", high - low, -1)

    def _column(self, name: str, tasks: np.ndarray) -> np.ndarray:
        """A key of the denoiser of each piece."""
        return np.array([getattr(one, name) for one in self.denoisers])[tasks]

    def _splits(self, tasks: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fewest and most inputs of pieces of so many ids that are not corrupted."""
        causal = self._column("kind", tasks) == "causal"
        rate = self._column("rate", tasks)
        low = np.maximum(np.rint((1 - 2 * rate) * (ids - 1)).astype(np.int64), 1)
        return np.where(causal, 1, low), np.where(causal, 1, ids - 1)

    def _runs(self, tasks: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that are taken out of so many, and the runs that they may form."""
        taken, spans = span_counts(lengths, self._column("rate", tasks), self._column("mean_span", tasks))
        corrupted = self._column("kind", tasks) == "span"
        return taken, np.where(corrupted, spans + self._column("roll", tasks), 0)

    def _largest(self, tasks: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) that a row has to hold for a piece of so many pairs, or for the couple that two make."""
        low, high = self._splits(tasks, pairs + 1)
        last = np.zeros(len(tasks), bool)
        if not self.frame.encoder_context:
            return self._sizes(tasks, pairs, last, low, low)
        inputs, targets = self._sizes(tasks, pairs, last, high, low)
        least_inputs, least_targets = self._sizes(tasks, pairs, last, low, high)
        second = self._spare(tasks, pairs) >= 0
        return inputs + second * (least_inputs + self.frame.aside), targets + second * least_targets

    def _sizes(
        self, tasks: np.ndarray, pairs: np.ndarray, last: np.ndarray, given: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of pieces of so many pairs; of a prefix, where `given` ids are inputs and all but `kept`
        are targets."""
        taken, runs = self._runs(tasks, pairs - last)
        spanned, mode = self._column("kind", tasks) == "span", self._column("mode", tasks) != ""
        inputs = np.where(spanned, 1 + pairs - last - taken + runs, given) + mode
        return inputs, np.where(spanned, taken + runs + 1, pairs + 1 - kept)
