"""Held-out documents, as batches of fixed rows, with what bits per byte need to be right."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from calledshot.data.packing import PIECE, pack
from calledshot.data.prepared import Prepared
from calledshot.data.shards import Readers
from calledshot.data.splitting import document_hash
from calledshot.objective import Batch, causal
from calledshot.recipe import Recipe, UsageError


@dataclass(frozen=True)
class Score:
    """Nats of some documents, and what they are measured against."""

    nats: float
    """Of every target: the documents' tokens and their end; begin is never predicted."""
    tokens: int
    """Targets."""
    bytes: int
    """UTF-8 bytes of the documents' texts."""
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
    """Whole held-out documents of one source, packed into rows.

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
    """(D,) int64 bytes of each document's text."""
    ids: np.ndarray
    """(D,) int64 ids of each document, begin and end included; one less are targets."""
    places: np.ndarray
    """(D, 2) int64: shard of each document and the offset of its first id there."""
    lossless: bool = True
    """Whether the tokenizer gives texts back as they were."""

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Targets."""
        return int(self.ids.sum()) - len(self.ids)

    def nats_by_document(self, first_row: int, batch: Batch, nats: np.ndarray) -> np.ndarray:
        """(D,) float64: the batch's nats, (B, T), summed by document. `first_row` is the selection's row that the
        batch begins with.

        Add these up over the batches and hand them to `score`.
        """
        # Rows of padding after the last one have no pieces to look up.
        rows = np.minimum(np.arange(first_row, first_row + len(batch.documents)), self.rows)
        real = batch.documents >= 0
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
            tokens = int(self.ids[mine].sum() - mine.sum())
            scores[language] = Score(
                float(nats[mine].sum()), tokens, int(self.bytes[mine].sum()), int(mine.sum()), self.lossless
            )
        return dict(sorted(scores.items(), key=lambda item: -item[1].bytes))


class HeldOut:
    """The held-out documents of every source."""

    def __init__(self, prepared: Prepared, recipe: Recipe) -> None:
        self.prepared = prepared
        self.context = recipe.model.context
        self.sources = tuple(source.name for source in prepared.sources if source.held_out.documents)
        """Names of the sources that have any; a source of a single document has none."""
        self._rows = max(recipe.batch.tokens // self.context, 1)
        self._readers = Readers()
        self.select = functools.cache(self._select)

    def _select(self, source: str, tokens: int = 0) -> Selection:
        """Whole documents of about `tokens` targets, all of them where it is 0.

        They are taken in the order of the hashes of their ids until there are enough, which is a fair sample: always
        the same, at least one, and a larger number adds to a smaller. Rows are packed in the documents' own order.
        """
        shards = self.prepared.source(source).held_out.shards
        if not shards:
            raise UsageError(f"{source}: a source of one document, none of which can be held out whole; add documents")
        indexes = [shard.index(self.prepared.path) for shard in shards]
        names = [name for shard in shards for name in shard.names(self.prepared.path)]
        ids = np.concatenate([index["ids"] for index in indexes])
        starts = np.concatenate([np.cumsum(index["ids"]) - index["ids"] for index in indexes])
        numbers = np.repeat(np.arange(len(shards)), [len(index) for index in indexes])
        languages = [
            shard.languages[code] for shard, index in zip(shards, indexes, strict=True) for code in index["language"]
        ]
        chosen = np.arange(len(ids))
        if tokens:
            order = np.array(sorted(range(len(ids)), key=lambda number: document_hash(names[number])))
            before = np.cumsum(ids[order] - 1) - (ids[order] - 1)
            chosen = np.sort(order[before < tokens])
        windows = list(pack([ids[chosen]], self.context))
        pieces = np.concatenate([pieces for pieces, _ in windows]) if windows else np.empty(0, PIECE)
        counts = np.concatenate([counts for _, counts in windows]) if windows else np.empty(0, np.int64)
        return Selection(
            source,
            pieces,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            tuple(names[number] for number in chosen),
            tuple(languages[number] for number in chosen),
            np.concatenate([index["bytes"] for index in indexes])[chosen],
            ids[chosen],
            np.stack([numbers[chosen], starts[chosen]], axis=1),
            self.prepared.tokenizer.lossless,
        )

    def batches(self, source: str, tokens: int = 0, rows: int = 0) -> Iterator[Batch]:
        """The rows of `select(source, tokens)` in order, `rows` at a time (as many as a training batch where it is 0).

        The last batch is filled up with rows of padding, so that all have one shape.
        """
        selection = self.select(source, tokens)
        shards = self.prepared.source(source).held_out.shards
        position = [one.name for one in self.prepared.sources].index(source)
        dtype = self.prepared.dtype
        rows = rows or self._rows
        for first in range(0, selection.rows, rows):
            filled = []
            for row in range(first, min(first + rows, selection.rows)):
                filled.append([])
                for piece in selection.pieces[selection.row_starts[row] : selection.row_starts[row + 1]]:
                    shard, start = selection.places[piece["document"]].tolist()
                    offset, count = start + int(piece["start"]), int(piece["pairs"]) + 1
                    path = self.prepared.path / f"{shards[shard].stem}.bin"
                    content = self._readers.read(path, dtype.itemsize * offset, dtype.itemsize * count)
                    filled[-1].append(np.frombuffer(content, dtype))
            filled += [[] for _ in range(rows - len(filled))]
            yield causal(filled, [position] * rows, self.context, self.prepared.tokenizer.pad)
