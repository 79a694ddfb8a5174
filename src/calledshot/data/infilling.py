"""Gaps in held-out text, to be filled by models that see both sides of them and by models that see one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from calledshot.data.frames import denoising_of, shortened
from calledshot.data.heldout import documents_of
from calledshot.data.packing import PIECE
from calledshot.data.prepared import Prepared
from calledshot.data.scores import Selection
from calledshot.data.shards import Readers
from calledshot.data.splitting import document_hash
from calledshot.objective import Batch, examples, lay_out
from calledshot.objective.chance import words
from calledshot.recipe import Recipe, UsageError


class Infilling:
    """N triples (left, middle, right) of a source's held-out documents, the same for every model of this tokenizer.

    Documents are cut into stretches as long as a triple, and those with the lowest hashes of document and place are
    taken: a larger number adds to a smaller. Batches come in two ways, and in both the loss is on the middle alone, so
    that bits per byte of the middle compare:

    - `gap`: left, a sentinel and right are given; the targets are the sentinel, the middle and the end. For models that
      learned to fill gaps, with the mode token of the kind of gaps that are most like these.
    - without: left is given and the middle comes next, for any model; what is on the right stays unknown.
    """

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        source: str,
        count: int = 512,
        lengths: tuple[int, int, int] = (96, 16, 96),
        longest_row: int = 0,
    ) -> None:
        """`lengths` are those of left, middle and right, in tokens. Rows are no longer than `longest_row` positions; 0
        takes the model's. UsageError where no document is that long."""
        self.prepared = prepared
        self.source = source
        self.lengths = lengths
        denoising = denoising_of(recipe, prepared.tokenizer)
        self.denoisers, self.frame = denoising.denoisers, denoising.frame
        if longest_row:
            self.frame = shortened(self.frame, longest_row)
        documents = documents_of(prepared, source)
        whole = sum(lengths)
        stretches = (documents.ids - 2) // whole
        if not stretches.any():
            raise UsageError(
                f"--predict gaps: no held-out document of {source} has {whole:,} tokens; --predict suffixes takes any"
            )
        document = np.repeat(np.arange(len(stretches)), stretches)
        number = np.arange(len(document)) - np.repeat(np.cumsum(stretches) - stretches, stretches)
        hashes = np.array([document_hash(name) for name in documents.names], np.uint64)
        chosen = np.argsort(words(hashes[document], number), kind="stable")[:count]
        self._documents = document[chosen]
        self._starts = number[chosen] * whole
        self.names = tuple(documents.names[number] for number in self._documents)
        """Id of each triple's document."""
        self._languages = tuple(documents.languages[number] for number in self._documents)
        read = documents.reader(prepared, self._documents, Readers())
        starts = enumerate(self._starts.tolist())
        self.ids = np.stack([read(triple, start, 1 + whole) for triple, start in starts]).astype(np.int32)
        """int32 (N, 1 + left + middle + right): the id before each triple, and the triple."""
        first = 1 + lengths[0]
        self.bytes = np.array(
            [len(prepared.tokenizer.decode_bytes(ids[first : first + lengths[1]].tolist())) for ids in self.ids]
        )
        """int64 (N,): bytes of each middle."""

    def select(self, gap: bool) -> Selection:
        """The triples as documents of a selection, to score the nats of `batches` with."""
        pieces = np.zeros(len(self.ids), PIECE)
        pieces["document"] = np.arange(len(pieces))
        pieces["start"] = self._starts
        pieces["pairs"] = sum(self.lengths if gap else self.lengths[:2])
        starts = np.arange(0, len(pieces), self._in_a_row(gap))
        return Selection(
            self.source,
            pieces,
            np.append(starts, len(pieces)),
            self.names,
            self._languages,
            self.bytes,
            np.full(len(pieces), self.ids.shape[1]),
            np.full(len(pieces), self.lengths[1]),
            self.prepared.tokenizer.lossless,
        )

    def batches(self, gap: bool, rows: int = 1) -> Iterator[Batch]:
        """The rows of `select(gap)` in order, `rows` at a time; the last batch is filled up with rows of padding."""
        selection = self.select(gap)
        position = [one.name for one in self.prepared.sources].index(self.source)
        left, middle, _ = self.lengths
        specials = self.frame.specials
        mode = specials.modes.get(self._mode(gap), -1)
        for first in range(0, selection.rows, rows):
            bounds = selection.row_starts[np.minimum(np.arange(first, first + rows + 1), selection.rows)]
            ids = self.ids[bounds[0] : bounds[-1], : selection.pieces["pairs"][0] + 1]
            count = len(ids)
            taken = np.zeros(ids.shape, bool)
            taken[:, 1 + left : 1 + left + middle] = True
            lengths, every = np.full(count, ids.shape[1]), np.ones(count, bool)
            made = examples(ids.ravel(), lengths, taken.ravel(), every & gap, np.full(count, mode), every, specials)
            if gap:
                weights = made.weights.reshape(count, -1)
                weights[:, [0, -1]] = 0
            yield lay_out(made, np.diff(bounds).tolist(), [position] * rows, self.frame)

    def _mode(self, gap: bool) -> str:
        """The mode token under which the model learned what is asked."""
        if gap:
            learned = [one for one in self.denoisers if one.kind == "span"]
            if not learned:
                raise UsageError("the objective has no span corruption, so that the model never learned to fill gaps")
            return min(learned, key=lambda one: (abs(np.log(one.mean_span / self.lengths[1])), one.rate)).mode
        return next((one.mode for one in self.denoisers if one.kind != "span" and one.mode), "")

    def _in_a_row(self, gap: bool) -> int:
        """Triples that fit in a row."""
        moded = int(bool(self._mode(gap)))
        left, middle, right = self.lengths
        inputs, targets = (1 + left + 1 + right, 1 + middle + 1) if gap else (1 + left, middle)
        size = np.array(inputs + moded), np.array(targets)
        if not self.frame.fits(*size):
            have = f"model.context = {self.frame.context}"
            if self.frame.encoder_context:
                have = f"model.encoder_context = {self.frame.encoder_context} and {have}"
            raise UsageError(
                f"--predict gaps: {left} tokens, a gap of {middle} and {right} more do not fit into {have}; "
                "--predict suffixes asks for what a short context allows"
            )
        return int(self.frame.capacity // self.frame.places(*size))
