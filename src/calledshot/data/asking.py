"""How documents are put to a model to be predicted, held-out ones or any: packed, parted and laid out as its topology
and objective want it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np

from calledshot.data.frames import denoising_of, shortened
from calledshot.data.packing import PIECE, Fitting, cut, pack, pack_pieces
from calledshot.data.scores import Selection
from calledshot.data.splitting import document_hash
from calledshot.data.tokenizer import Tokenizer
from calledshot.objective import Batch, Frame, causal, examples, lay_out
from calledshot.objective.chance import uniform, words
from calledshot.objective.spans import ranges
from calledshot.recipe import Recipe, UsageError

FORMALITIES = 4
"""Positions kept free beside a piece and its suffix: a mode token, a sentinel on either side, an end."""

Read = Callable[[int, int, int], np.ndarray]
"""Gives `count` ids of document number `document` from its id number `start` on."""


class Asking:
    """What a model is asked to predict.

    A decoder and a prefix LM predict each token from all before it in its piece, whatever they were trained on. With
    `suffixes`, and always for an encoder-decoder, each piece is parted in two at a place between a quarter and three
    quarters of it, fixed by its document's id: the first part is given, as inputs and seen both ways where the topology
    has that, and the second is predicted. Models of every topology and objective, whose pieces are equally long, then
    predict the same bytes from the same text.

    A model is asked in the way that it has learned: with the mode token of its prefixes, S in UL2, and where it has
    learned nothing but to fill gaps, by a sentinel at the end of the prefix, which has no loss.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        suffixes: bool | None = None,
        piece: int = 0,
        shortest_row: int = 0,
    ) -> None:
        """`piece` is the length in pairs that suffixes' pieces are cut to, where models of different contexts are to
        be compared; 0 takes what fits. UsageError where it does not fit.

        With `shortest_row` rows are no longer than the next multiple of it that holds their longest piece: for contexts
        far longer than most documents. Pieces, and with them every number, stay what they are.
        """
        denoising = denoising_of(recipe, tokenizer)
        self.tokenizer = tokenizer
        self.frame = denoising.frame
        self.suffixes = bool(self.frame.encoder_context) if suffixes is None else suffixes
        """Whether prefixes are given."""
        if self.frame.encoder_context and not self.suffixes:
            raise UsageError("an encoder-decoder predicts nothing without inputs: take --predict suffixes")
        whole = [one for one in denoising.denoisers if one.kind != "span"]
        asked = whole[0] if whole else max(denoising.denoisers, key=lambda one: one.mean_span)
        self.mode = asked.mode
        """Mode token put before each piece; empty for none."""
        self.filling = self.suffixes and not whole
        """Whether the suffix is asked for as what fills a gap."""
        self.piece = self._piece(piece)
        """Pairs of the longest piece."""
        self._shortest = shortest_row if 0 < shortest_row < self.frame.capacity else 0

    def _piece(self, asked: int) -> int:
        context, encoder_context = self.frame.context, self.frame.encoder_context
        if not self.suffixes:
            return context - bool(self.mode)
        # Room for a mode token, a gap's sentinel on both sides and its end is left for every model, needed or not, so
        # that all get the same pieces.
        pairs = asked or min(context, encoder_context or context) - FORMALITIES
        shortest, longest = max(pairs // 4, 1), pairs // 4 * 3 + 3
        inputs, targets = longest + 2, pairs + 1 - (shortest if encoder_context else longest) + 2
        if pairs < 1 or not self.frame.fits(np.array(inputs), np.array(targets)):
            raise UsageError(
                f"pieces of {pairs} tokens do not fit a context of {context}"
                + (f" with an encoder's of {encoder_context}" if encoder_context else "")
            )
        return pairs

    def select(
        self,
        source: str,
        names: Sequence[str],
        languages: Sequence[str],
        ids: np.ndarray,
        size: np.ndarray,
        read: Read,
    ) -> Selection:
        """D documents packed into rows: their names and languages, their lengths in ids and bytes, both (D,)."""
        hashes = np.array([document_hash(name) for name in names], np.uint64) if self.suffixes else None
        whole = self._fitting(hashes, self.frame)
        lengths: list[np.ndarray] = []
        if self._shortest:
            windows = []
            pieces = cut(ids - 1, 0, whole)
            needs = self._lengths(pieces, hashes)
            for length in np.unique(needs).tolist():
                fitting = self._fitting(hashes, shortened(self.frame, length))
                for window in pack_pieces(pieces[needs == length], fitting):
                    windows.append(window)
                    lengths.append(np.full(len(window[1]), length))
        else:
            windows = list(pack([ids], whole))
        pieces = np.concatenate([pieces for pieces, _ in windows]) if windows else np.empty(0, PIECE)
        counts = np.concatenate([counts for _, counts in windows]) if windows else np.empty(0, np.int64)
        splits = None if hashes is None else _splits(pieces, hashes)
        predicted = pieces["pairs"] if splits is None else pieces["pairs"] + 1 - splits
        return Selection(
            source,
            pieces,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            tuple(names),
            tuple(languages),
            size if splits is None else self._suffix_bytes(pieces, splits, len(ids), read),
            ids,
            np.bincount(pieces["document"], predicted, len(ids)).astype(np.int64),
            self.tokenizer.lossless,
            splits,
            np.concatenate(lengths) if lengths else None,
        )

    def _fitting(self, hashes: np.ndarray | None, frame: Frame) -> Fitting:
        def places(pieces: np.ndarray) -> np.ndarray:
            return frame.places(*self._sizes(pieces, hashes))

        return Fitting(frame.capacity, np.array([self.piece]), places)

    def _sizes(self, pieces: np.ndarray, hashes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """int64: inputs and targets of pieces."""
        given = np.ones(len(pieces), np.int64) if hashes is None else _splits(pieces, hashes)
        inputs, targets = given + bool(self.mode), pieces["pairs"] + 1 - given
        if self.filling:
            inputs, targets = inputs + 1, targets + 2 - pieces["last"]
        return inputs, targets

    def _lengths(self, pieces: np.ndarray, hashes: np.ndarray | None) -> np.ndarray:
        """int64: positions of the row that each piece goes into, a multiple of the shortest."""
        inputs, targets = self._sizes(pieces, hashes)
        frame = self.frame
        needs = np.maximum(inputs + frame.aside, targets) if frame.encoder_context else inputs + targets - 1
        return np.minimum(-(-needs // self._shortest) * self._shortest, frame.capacity)

    def _suffix_bytes(self, pieces: np.ndarray, splits: np.ndarray, documents: int, read: Read) -> np.ndarray:
        """(D,) int64: bytes of the text that is predicted of each document."""
        size = np.zeros(documents, np.int64)
        for (document, start, pairs, _, last), split in zip(pieces.tolist(), splits.tolist(), strict=True):
            # The end token is no text.
            suffix = read(document, start + split, pairs + 1 - split - last)
            size[document] += len(self.tokenizer.decode_bytes(suffix.tolist()))
        return size

    def batches(self, selection: Selection, read: Read, rows: int, position: int = 0) -> Iterator[Batch]:
        """The rows of a selection in order, `rows` at a time, of the source of that position in the mixture.

        The last batch is filled up with rows of padding, so that all have one shape. With a shortest row that is what
        `rows` are counted in, batches have as many as fit in as many positions, and nothing is filled up.
        """
        for first, count, frame in self._parts(selection, rows):
            bounds = selection.row_starts[np.minimum(np.arange(first, first + count + 1), selection.rows)]
            part = slice(bounds[0], bounds[-1])
            pieces = selection.pieces[part]
            texts = [read(document, start, pairs + 1) for document, start, pairs, *_ in pieces.tolist()]
            splits = None if selection.splits is None else selection.splits[part]
            yield self._batch(texts, np.diff(bounds).tolist(), pieces["last"], splits, [position] * count, frame)

    def _parts(self, selection: Selection, rows: int) -> Iterator[tuple[int, int, Frame]]:
        """The first row, the number of rows and the frame of each batch."""
        if selection.lengths is None:
            yield from ((first, rows, self.frame) for first in range(0, selection.rows, rows))
            return
        starts = np.flatnonzero(np.diff(selection.lengths, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), selection.rows]):
            length = int(selection.lengths[start])
            most = max(1, rows * self._shortest // length)
            for first in range(start, stop, most):
                yield first, min(most, stop - first), shortened(self.frame, length)

    def _batch(
        self,
        texts: list[np.ndarray],
        counts: list[int],
        last: np.ndarray,
        splits: np.ndarray | None,
        sources: list[int],
        frame: Frame,
    ) -> Batch:
        specials = frame.specials
        if splits is None and not self.mode:
            pieces = iter(texts)
            return causal([list(islice(pieces, count)) for count in counts], sources, frame.context, specials.pad)
        if self.filling:
            texts = [ids[:-1] if end else ids for ids, end in zip(texts, last.tolist(), strict=True)]
        lengths = np.array([len(ids) for ids in texts], np.int64)
        given = np.ones_like(lengths) if splits is None else splits
        made = examples(
            np.concatenate(texts).astype(np.int32),
            lengths,
            ranges(np.zeros_like(lengths), lengths) >= np.repeat(given, lengths),
            np.full(len(texts), self.filling),
            np.full(len(texts), specials.modes.get(self.mode, -1)),
            np.full(len(texts), splits is not None),
            specials,
        )
        if self.filling:
            ends = np.cumsum(made.target_lengths)
            made.weights[ends - made.target_lengths] = 0
            made.weights[ends - 1] = last
        return lay_out(made, counts, sources, frame)


def _splits(pieces: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Ids of each piece that are given, the same wherever its document is read and packed."""
    chance = uniform(words(hashes[pieces["document"]], pieces["start"]))
    part = ((0.25 + 0.5 * chance) * (pieces["pairs"] + 1)).astype(np.int64)
    # At least the first id is given, and some text is left to predict where there is any.
    return np.clip(part, 1, np.maximum(pieces["pairs"] - pieces["last"], 1))
