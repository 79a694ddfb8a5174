"""Held-out documents, as batches of fixed rows, with what bits per byte need to be right."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from calledshot.data.frames import denoising_of
from calledshot.data.packing import PIECE, Fitting, pack
from calledshot.data.prepared import Prepared
from calledshot.data.shards import Readers, Shard
from calledshot.data.splitting import document_hash
from calledshot.objective import Batch, causal, examples, lay_out
from calledshot.objective.chance import uniform, words
from calledshot.objective.spans import ranges
from calledshot.recipe import Recipe, UsageError

FORMALITIES = 4
"""Positions kept free beside a piece and its suffix: a mode token, a sentinel on either side, an end."""


@dataclass(frozen=True)
class Score:
    """Nats of some documents, and what they are measured against."""

    nats: float
    """Of every target: the tokens that are predicted, and the documents' ends; begin never is."""
    tokens: int
    """Targets."""
    bytes: int
    """UTF-8 bytes of the text that is predicted."""
    documents: int
    lossless: bool = True
    """Whether the tokens give the bytes back."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, since the same bytes are divided by; the end tokens' nats are in it. NaN where
        the tokenizer loses text."""
        return self.nats / math.log(2) / self.bytes if self.bytes and self.lossless else math.nan


@dataclass(frozen=True)
class Selection:
    """Held-out documents of one source, whole or the suffixes of their pieces, packed into rows.

    Documents are numbered from 0 to D - 1, pieces from 0 to P - 1 over all rows in order.
    """

    source: str
    pieces: np.ndarray
    """(P,) of dtype PIECE: which run of pairs of which document, in row order."""
    row_starts: np.ndarray
    """(rows + 1,) int64: the first piece of each row."""
    names: tuple[str, ...]
    """Documents' ids."""
    languages: tuple[str, ...]
    """Language of each document."""
    bytes: np.ndarray
    """(D,) int64 bytes of each document's text, as far as it is predicted."""
    ids: np.ndarray
    """(D,) int64 ids of each document, begin and end included."""
    targets: np.ndarray
    """(D,) int64 ids of each document that are predicted."""
    places: np.ndarray
    """(D, 2) int64: shard of each document and the offset of its first id there."""
    lossless: bool = True
    """Whether the tokenizer gives texts back as they were."""
    splits: np.ndarray | None = None
    """(P,) int64: ids of each piece that are given; None where it is the first alone."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Targets."""
        return int(self.targets.sum())

    def nats_by_document(self, first_row: int, batch: Batch, nats: np.ndarray) -> np.ndarray:
        """(D,) float64: the batch's nats, (B, T), summed by document. `first_row` is the selection's row that the
        batch begins with.

        Add these up over the batches and hand them to `score`.
        """
        # Rows of padding after the last one have no pieces to look up.
        rows = np.minimum(np.arange(first_row, first_row + len(batch.documents)), self.rows)
        real = batch.loss_weights > 0
        piece = (self.row_starts[rows][:, None] + batch.documents)[real]
        return np.bincount(self.pieces["document"][piece], np.asarray(nats, np.float64)[real], len(self.ids))

    def score(self, nats: np.ndarray) -> Score:
        """All documents together; `nats` (D,)."""
        return Score(float(nats.sum()), self.tokens, int(self.bytes.sum()), len(self.ids), self.lossless)

    def score_by_language(self, nats: np.ndarray) -> dict[str, Score]:
        """One score a language, most bytes first."""
        languages = np.array(self.languages)
        scores = {}
        for language in dict.fromkeys(self.languages):
            mine = languages == language
            tokens = int(self.targets[mine].sum())
            scores[language] = Score(
                float(nats[mine].sum()), tokens, int(self.bytes[mine].sum()), int(mine.sum()), self.lossless
            )
        return dict(sorted(scores.items(), key=lambda item: -item[1].bytes))


@dataclass(frozen=True)
class Documents:
    """All held-out documents of a source; arrays and tuples have one entry a document."""

    shards: tuple[Shard, ...]
    names: tuple[str, ...]
    languages: tuple[str, ...]
    ids: np.ndarray
    """int64 ids, begin and end included."""
    bytes: np.ndarray
    """int64 bytes of text."""
    places: np.ndarray
    """(documents, 2) int64: shard, and the offset of the first id there."""


def documents_of(prepared: Prepared, source: str) -> Documents:
    """The held-out documents of a source. UsageError where it has none."""
    shards = prepared.source(source).held_out.shards
    if not shards:
        raise UsageError(f"{source}: a source of one document, none of which can be held out whole; add documents")
    indexes = [shard.index(prepared.path) for shard in shards]
    starts = np.concatenate([np.cumsum(index["ids"]) - index["ids"] for index in indexes])
    numbers = np.repeat(np.arange(len(shards)), [len(index) for index in indexes])
    return Documents(
        shards,
        tuple(name for shard in shards for name in shard.names(prepared.path)),
        tuple(
            shard.languages[code] for shard, index in zip(shards, indexes, strict=True) for code in index["language"]
        ),
        np.concatenate([index["ids"] for index in indexes]),
        np.concatenate([index["bytes"] for index in indexes]),
        np.stack([numbers, starts], axis=1),
    )


def read_ids(prepared: Prepared, shard: Shard, offset: int, count: int, readers: Readers) -> np.ndarray:
    """`count` ids of a shard from `offset` on."""
    dtype = prepared.dtype
    content = readers.read(prepared.path / f"{shard.stem}.bin", dtype.itemsize * offset, dtype.itemsize * count)
    return np.frombuffer(content, dtype)


class HeldOut:
    """The held-out documents of every source, to be predicted as the recipe's topology can.

    A decoder and a prefix LM predict each token from all before it in its piece, whatever they were trained on. With
    `suffixes`, and always for an encoder-decoder, each piece is parted in two at a place between a quarter and three
    quarters of it, fixed by its document's id: the first part is given, as inputs and seen both ways where the topology
    has that, and the second is predicted. Models of every topology and objective, whose pieces are equally long, then
    predict the same bytes from the same text.

    A model is asked in the way that it has learned: with the mode token of its prefixes, S in UL2, and where it has
    learned nothing but to fill gaps, by a sentinel at the end of the prefix, which has no loss.
    """

    def __init__(self, prepared: Prepared, recipe: Recipe, suffixes: bool | None = None, piece: int = 0) -> None:
        """`piece` is the length in pairs that suffixes' pieces are cut to, where models of different contexts are to
        be compared; 0 takes what fits. UsageError where it does not fit.
        """
        self.prepared = prepared
        self.context = recipe.model.context
        self.sources = tuple(source.name for source in prepared.sources if source.held_out.documents)
        """Names of the sources that have any; a source of a single document has none."""
        denoising = denoising_of(recipe, prepared.tokenizer)
        self.frame = denoising.frame
        self.suffixes = bool(self.frame.encoder_context) if suffixes is None else suffixes
        """Whether prefixes are given."""
        if self.frame.encoder_context and not self.suffixes:
            raise UsageError("an encoder-decoder predicts nothing without inputs: its held-out loss is of suffixes")
        whole = [one for one in denoising.denoisers if one.kind != "span"]
        asked = whole[0] if whole else max(denoising.denoisers, key=lambda one: one.mean_span)
        self.mode = asked.mode
        """Mode token put before each piece; empty for none."""
        self.filling = self.suffixes and not whole
        """Whether the suffix is asked for as what fills a gap."""
        self._cut = self._piece(piece)
        self._rows = max(recipe.batch.tokens // self.frame.positions, 1)
        self._readers = Readers()
        self.select = functools.cache(self._select)

    def _piece(self, asked: int) -> int:
        """Pairs of the longest piece."""
        if not self.suffixes:
            return self.context - bool(self.mode)
        # Room for a mode token, a gap's sentinel on both sides and its end is left for every model, needed or not, so
        # that all get the same pieces.
        pairs = asked or min(self.context, self.frame.encoder_context or self.context) - FORMALITIES
        shortest, longest = max(pairs // 4, 1), pairs // 4 * 3 + 3
        inputs, targets = longest + 2, pairs + 1 - (shortest if self.frame.encoder_context else longest) + 2
        if pairs < 1 or not self.frame.fits(np.array(inputs), np.array(targets)):
            raise UsageError(
                f"pieces of {pairs} tokens do not fit a context of {self.context}"
                + (f" with an encoder's of {self.frame.encoder_context}" if self.frame.encoder_context else "")
            )
        return pairs

    def _select(self, source: str, tokens: int = 0) -> Selection:
        """Documents of about `tokens` tokens, all of them where it is 0, each with every piece that it has.

        They are taken in the order of the hashes of their ids until there are enough, which is a fair sample: always
        the same, at least one, and a larger number adds to a smaller. Rows are packed in the documents' own order.
        """
        documents = documents_of(self.prepared, source)
        names, ids = documents.names, documents.ids
        chosen = np.arange(len(ids))
        if tokens:
            order = np.array(sorted(range(len(ids)), key=lambda number: document_hash(names[number])))
            before = np.cumsum(ids[order] - 1) - (ids[order] - 1)
            chosen = np.sort(order[before < tokens])
        hashes = np.array([document_hash(names[number]) for number in chosen], np.uint64) if self.suffixes else None
        windows = list(pack([ids[chosen]], self._fitting(hashes)))
        pieces = np.concatenate([pieces for pieces, _ in windows]) if windows else np.empty(0, PIECE)
        counts = np.concatenate([counts for _, counts in windows]) if windows else np.empty(0, np.int64)
        splits = None if hashes is None else _splits(pieces, hashes)
        predicted = pieces["pairs"] if splits is None else pieces["pairs"] + 1 - splits
        places = documents.places[chosen]
        size = documents.bytes[chosen] if splits is None else self._suffix_bytes(documents, places, pieces, splits)
        return Selection(
            source,
            pieces,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            tuple(names[number] for number in chosen),
            tuple(documents.languages[number] for number in chosen),
            size,
            ids[chosen],
            np.bincount(pieces["document"], predicted, len(chosen)).astype(np.int64),
            places,
            self.prepared.tokenizer.lossless,
            splits,
        )

    def _fitting(self, hashes: np.ndarray | None) -> Fitting:
        def places(pieces: np.ndarray) -> np.ndarray:
            given = 1 if hashes is None else _splits(pieces, hashes)
            inputs, targets = given + bool(self.mode), pieces["pairs"] + 1 - given
            if self.filling:
                inputs, targets = inputs + 1, targets + 2 - pieces["last"]
            return self.frame.places(inputs, targets)

        return Fitting(self.frame.capacity, np.array([self._cut]), places)

    def _suffix_bytes(
        self, documents: Documents, places: np.ndarray, pieces: np.ndarray, splits: np.ndarray
    ) -> np.ndarray:
        """(D,) int64: bytes of the text that is predicted of each document."""
        tokenizer = self.prepared.tokenizer
        size = np.zeros(len(places), np.int64)
        for piece, split in zip(pieces, splits.tolist(), strict=True):
            shard, start = places[piece["document"]].tolist()
            first, end = int(piece["start"]) + split, int(piece["start"] + piece["pairs"]) + 1
            # The end token is no text.
            count = end - first - int(piece["last"])
            ids = read_ids(self.prepared, documents.shards[shard], start + first, count, self._readers)
            size[piece["document"]] += len(tokenizer.decode_bytes(ids.tolist()))
        return size

    def batches(self, source: str, tokens: int = 0, rows: int = 0) -> Iterator[Batch]:
        """The rows of `select(source, tokens)` in order, `rows` at a time (as many as a training batch where it is 0).

        The last batch is filled up with rows of padding, so that all have one shape.
        """
        selection = self.select(source, tokens)
        shards = self.prepared.source(source).held_out.shards
        position = [one.name for one in self.prepared.sources].index(source)
        rows = rows or self._rows
        for first in range(0, selection.rows, rows):
            stops = np.minimum(np.arange(first, first + rows + 1), selection.rows)
            bounds = selection.row_starts[stops].tolist()
            read = []
            for piece in selection.pieces[bounds[0] : bounds[-1]]:
                shard, start = selection.places[piece["document"]].tolist()
                offset, count = start + int(piece["start"]), int(piece["pairs"]) + 1
                read.append(read_ids(self.prepared, shards[shard], offset, count, self._readers))
            part = slice(bounds[0], bounds[-1])
            splits = None if selection.splits is None else selection.splits[part]
            last = selection.pieces["last"][part]
            yield self._batch(read, np.diff(bounds).tolist(), last, splits, [position] * rows)

    def _batch(
        self,
        read: list[np.ndarray],
        counts: list[int],
        last: np.ndarray,
        splits: np.ndarray | None,
        sources: list[int],
    ) -> Batch:
        specials = self.frame.specials
        if splits is None and not self.mode:
            pieces = iter(read)
            return causal([list(islice(pieces, count)) for count in counts], sources, self.context, specials.pad)
        if self.filling:
            read = [ids[:-1] if end else ids for ids, end in zip(read, last.tolist(), strict=True)]
        lengths = np.array([len(ids) for ids in read], np.int64)
        given = np.ones_like(lengths) if splits is None else splits
        taken = ranges(np.zeros_like(lengths), lengths) >= np.repeat(given, lengths)
        made = examples(
            np.concatenate(read).astype(np.int32),
            lengths,
            taken,
            np.full(len(read), self.filling),
            np.full(len(read), specials.modes.get(self.mode, -1)),
            np.full(len(read), splits is not None),
            specials,
        )
        if self.filling:
            ends = np.cumsum(made.target_lengths)
            made.weights[ends - made.target_lengths] = 0
            made.weights[ends - 1] = last
        return lay_out(made, counts, sources, self.frame)


def _splits(pieces: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Ids of each piece that are given, the same wherever its document is read and packed."""
    chance = uniform(words(hashes[pieces["document"]], pieces["start"]))
    part = ((0.25 + 0.5 * chance) * (pieces["pairs"] + 1)).astype(np.int64)
    # At least the first id is given, and some text is left to predict where there is any.
    return np.clip(part, 1, np.maximum(pieces["pairs"] - pieces["last"], 1))
