"""Held-out documents, as batches of fixed rows, with what bits per byte need to be right."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from calledshot.data.asking import Asking, Read
from calledshot.data.prepared import Prepared
from calledshot.data.scores import Selection
from calledshot.data.shards import Readers, Shard
from calledshot.data.splitting import document_hash
from calledshot.objective import Batch
from calledshot.recipe import Recipe, UsageError


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

    def reader(self, prepared: Prepared, chosen: np.ndarray, readers: Readers) -> Read:
        """Gives ids of the chosen documents, which are numbered from 0 in that order."""
        dtype = prepared.dtype

        def read(document: int, start: int, count: int) -> np.ndarray:
            shard, offset = self.places[chosen[document]].tolist()
            path = prepared.path / f"{self.shards[shard].stem}.bin"
            content = readers.read(path, dtype.itemsize * (offset + start), dtype.itemsize * count)
            return np.frombuffer(content, dtype)

        return read


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


class HeldOut:
    """The held-out documents of every source, to be predicted as `Asking` says."""

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        suffixes: bool | None = None,
        piece: int = 0,
        shortest_row: int = 0,
    ) -> None:
        """`suffixes`, `piece` and `shortest_row` are `Asking`'s: a decoder's loss is of whole documents unless they are
        asked for."""
        self.prepared = prepared
        self.context = recipe.model.context
        self.asking = Asking(recipe, prepared.tokenizer, suffixes, piece, shortest_row)
        self.sources = tuple(source.name for source in prepared.sources if source.held_out.documents)
        """Names of the sources that have any; a source of a single document has none."""
        self._rows = max(recipe.batch.tokens // self.asking.frame.positions, 1)
        self._readers = Readers()
        self._chosen = functools.cache(self._choose)
        self.select = functools.cache(self._select)

    def _choose(self, source: str, tokens: int) -> tuple[Documents, np.ndarray, Read]:
        """A source's documents, the numbers of those chosen, in the documents' own order, and what reads them."""
        documents = documents_of(self.prepared, source)
        chosen = np.arange(len(documents.ids))
        if tokens:
            order = np.array(sorted(chosen.tolist(), key=lambda number: document_hash(documents.names[number])))
            length = documents.ids[order] - 1
            chosen = np.sort(order[np.cumsum(length) - length < tokens])
        return documents, chosen, documents.reader(self.prepared, chosen, self._readers)

    def _select(self, source: str, tokens: int = 0) -> Selection:
        """Documents of about `tokens` tokens, all of them where it is 0, each with every piece that it has.

        They are taken in the order of the hashes of their ids until there are enough, which is a fair sample: always
        the same, at least one, and a larger number adds to a smaller. Rows are packed in the documents' own order.
        """
        documents, chosen, read = self._chosen(source, tokens)
        names, languages = ([each[number] for number in chosen] for each in (documents.names, documents.languages))
        return self.asking.select(source, names, languages, documents.ids[chosen], documents.bytes[chosen], read)

    def batches(self, source: str, tokens: int = 0, rows: int = 0) -> Iterator[Batch]:
        """The rows of `select(source, tokens)` in order, `rows` at a time (as many as a training batch where it is 0).

        The last batch is filled up with rows of padding, so that all have one shape.
        """
        position = [one.name for one in self.prepared.sources].index(source)
        _, _, read = self._chosen(source, tokens)
        return self.asking.batches(self.select(source, tokens), read, rows or self._rows, position)
