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


@dataclass(frozen=True)
class Denoising:
    """A mixture of denoisers in one topology: how long their pieces are, and what becomes of them.

    A piece is a run of a document's (input, target) pairs, as in the causal objective: L pairs are L + 1 ids, the first
    of which, the begin token or the id before the piece, is given and never predicted. So every token of every document
    is text of exactly one piece in a pass over the data.

    - `causal`: all but the first id are targets.
    - `prefix`: of n ids the first s are inputs, s uniform from max(1, round((1 - 2 rate) (n - 1))) to n - 1 (T5's
      random_prefix_noise_mask).
    - `span`: the first id stays and the others are corrupted (`span_counts`, `span_mask`), which T5 does with the first
      one too; the document's end token, where the piece has it, is left out, since the targets have one of their own.
      With `roll` the corruption is rotated by any number of tokens; a run that this parts in two gets two sentinels,
      where T5's code gives the targets one fewer than the inputs.

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
        return hashlib.sha256(json.dumps([frame, parts, self.cuts.tolist()]).encode()).hexdigest()

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
        them then fill a row.
        """
        pairs = np.arange(1, self.frame.positions + 1)
        last = np.zeros(len(pairs), bool)
        cuts = []
        for number in range(len(self.denoisers)):
            tasks = np.full(len(pairs), number)
            low, high = self._splits(tasks, pairs + 1)
            fits = self.frame.fits(*self._sizes(tasks, pairs, last, high if self.frame.encoder_context else low, low))
            fits &= self._runs(tasks, pairs)[1] <= len(self.frame.specials.sentinels)
            longest = int(pairs[fits].max())
            near = pairs[longest - int(longest * SHORTENED) - 1 : longest]
            in_a_row = self.frame.capacity // self.places(tasks[: len(near)], near, last[: len(near)])
            cuts.append(int(near[len(near) - 1 - np.argmax((in_a_row * near)[::-1])]))
        return np.array(cuts, np.int64)

    def places(self, tasks: np.ndarray, pairs: np.ndarray, last: np.ndarray) -> np.ndarray:
        """int64 (P,): room that pieces of so many pairs take of a row's `frame.capacity`.

        `last` (P,) says which pieces end their document. A prefix counts as its mean length where its length matters,
        for an encoder: `batch` sees to it that a row's prefixes fit together.
        """
        low, high = self._splits(tasks, pairs + 1)
        if not self.frame.encoder_context:
            return self.frame.places(*self._sizes(tasks, pairs, last, low, low))
        middle = (low + high) // 2
        return self.frame.places(*self._sizes(tasks, pairs, last, low + high - middle, middle))

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
        taken = within >= np.repeat(self._choose_splits(task, pairs, closed, counts, chance), lengths)
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
        self, tasks: np.ndarray, pairs: np.ndarray, closed: np.ndarray, counts: np.ndarray, chance: np.ndarray
    ) -> np.ndarray:
        """int64 (P,): ids that are inputs, of the pieces whose kind is `prefix` or `causal`.

        With an encoder the prefixes of a row must fit together. They are drawn one after the other, each uniformly from
        the lengths that leave the others room: two pieces that fill their row get each other's complement, and each of
        them any length with the same chance.
        """
        low, high = self._splits(tasks, pairs + 1)
        splits = low + (chance * (high - low + 1)).astype(np.int64)
        if not self.frame.encoder_context:
            return splits
        inputs, targets = self._sizes(tasks, pairs, closed, low, low)
        stop = 0
        for count in counts.tolist():
            row = slice(stop, stop + count)
            stop += count
            # The sum of the prefixes beyond their shortest may be from `least` to `most`.
            most = self.frame.encoder_context - int(inputs[row].sum()) - count * self.frame.aside
            least = int(targets[row].sum()) - self.frame.context
            spare = np.where(self._column("kind", tasks[row]) == "prefix", high[row] - low[row], 0).tolist()
            left = sum(spare)
            for place, room in enumerate(spare):
                if room:
                    left -= room
                    shortest, longest = max(0, least - left), min(room, most)
                    drawn = shortest + int(chance[row][place] * (longest - shortest + 1))
                    splits[row.start + place] = low[row.start + place] + drawn
                    most -= drawn
                    least -= drawn
        return splits

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

    def _sizes(
        self, tasks: np.ndarray, pairs: np.ndarray, last: np.ndarray, given: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of pieces of so many pairs; of a prefix, where `given` ids are inputs and all but `kept`
        are targets."""
        taken, runs = self._runs(tasks, pairs - last)
        spanned, mode = self._column("kind", tasks) == "span", self._column("mode", tasks) != ""
        inputs = np.where(spanned, 1 + pairs - last - taken + runs, given) + mode
        return inputs, np.where(spanned, taken + runs + 1, pairs + 1 - kept)
