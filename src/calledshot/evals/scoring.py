"""Loss, perplexity and bits per byte of whole documents: the held-out ones of a run's data, or any text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calledshot.data import HeldOut, Prepared, Selection, Tokenizer
from calledshot.data.packing import pack
from calledshot.data.tokenizer import as_array
from calledshot.model import Decoder
from calledshot.model.evaluate import document_nats
from calledshot.objective import Batch, causal
from calledshot.recipe import RunError, UsageError
from calledshot.rundir import RunDirectory
from calledshot.stats import Interval, bootstrap_interval, mean_interval
from calledshot.training import Loaded

BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Positions in one forward pass."""
BOOTSTRAP_DOCUMENTS = 2000
"""Up to so many documents intervals are bootstrapped; past it Student's t says the same at once."""

Split = Literal["held-out", "train"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measure:
    """A group of documents. Intervals are over documents, drawn whole, since tokens of one depend on each other."""

    documents: int
    tokens: int
    """Targets: the documents' tokens and their end."""
    bytes: int
    """UTF-8 bytes of their texts."""
    loss: Interval
    """Nats a token."""
    bits_per_byte: Interval
    """Independent of the tokenizer; the end tokens' bits are in it."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss.value)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def record(self) -> dict[str, Any]:
        """As it stands in a summary; ends of an interval that says nothing are None."""
        record: dict[str, Any] = {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes_per_token,
            "perplexity": self.perplexity,
        }
        for name, interval in (("loss", self.loss), ("bits_per_byte", self.bits_per_byte)):
            ends = {"low": interval.low, "high": interval.high}
            record[name] = interval.value if math.isfinite(interval.value) else None
            record |= {f"{name}_{end}": value if math.isfinite(value) else None for end, value in ends.items()}
        return record


@dataclass(frozen=True)
class Scored:
    """What each document of a source cost."""

    source: str
    names: tuple[str, ...]
    languages: tuple[str, ...]
    nats: np.ndarray
    """(D,) float64."""
    tokens: np.ndarray
    """(D,) int64 targets."""
    bytes: np.ndarray
    """(D,) int64 bytes of text."""
    lossless: bool = True
    """Whether the tokenizer gives texts back as they were; bits per byte are not known otherwise."""

    def measure(self, language: str | None = None) -> Measure:
        """All documents, or those of one language."""
        mine = np.array([language in (None, one) for one in self.languages])
        nats, tokens, size = self.nats[mine], self.tokens[mine], self.bytes[mine]
        bits = _ratio(nats / math.log(2), size) if self.lossless else Interval(math.nan, -math.inf, math.inf)
        return Measure(int(mine.sum()), int(tokens.sum()), int(size.sum()), _ratio(nats, tokens), bits)

    def by_language(self) -> dict[str, Measure]:
        """A measure for each language, most bytes first; {} where there is only one."""
        if len(set(self.languages)) < 2:
            return {}
        measures = {language: self.measure(language) for language in dict.fromkeys(self.languages)}
        return dict(sorted(measures.items(), key=lambda item: -item[1].bytes))


def prepared_data(run: RunDirectory) -> Prepared:
    """The prepared data that a run was trained on.

    UsageError where they are neither in its own lab nor in this one, RunError where they were made anew since, so that
    another tokenizer came out.
    """
    prepared = Prepared.of_run(run, otherwise="evaluate other text with --text FILE")
    if (prepared.path / "tokenizer.json").read_bytes() != (run.path / "tokenizer.json").read_bytes():
        raise RunError(
            f"{run.path}: its tokenizer is not that of {prepared.path}, since the sources have changed; "
            "bring back the folder that it was trained on, or evaluate other text with --text FILE"
        )
    return prepared


def score_prepared(
    loaded: Loaded,
    prepared: Prepared,
    *,
    sources: Sequence[str] = (),
    tokens: int = 0,
    split: Split = "held-out",
    progress: Progress | None = None,
) -> dict[str, Scored]:
    """Whole documents of the sources (all that have some) by source, about `tokens` targets each, all for 0."""
    if split == "train":
        as_if = tuple(replace(source, held_out=source.train) for source in prepared.sources)
        prepared = replace(prepared, sources=as_if)
    held_out = HeldOut(prepared, loaded.recipe)
    if not held_out.sources:
        raise UsageError(f"{prepared.path}: no source holds documents out; evaluate other text with --text FILE")
    for name in sources:
        prepared.source(name)
    rows = _rows(loaded.model)
    scored = {}
    for name in sources or held_out.sources:
        selection = held_out.select(name, tokens)
        batches = held_out.batches(name, tokens, rows)
        scored[name] = _score(loaded.model, selection, batches, progress)
    return scored


def read_texts(files: Sequence[Path]) -> dict[str, str]:
    """Text by file name; UsageError for a file that is missing, empty or not UTF-8."""
    texts = {}
    for file in files:
        try:
            texts[str(file)] = file.read_bytes().decode()
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror}); --text takes text files") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: is not UTF-8 text (byte {error.start}); convert it first") from error
        if not texts[str(file)]:
            raise UsageError(f"{file}: is empty, so there is nothing to score")
    return texts


def score_texts(loaded: Loaded, texts: dict[str, str], progress: Progress | None = None) -> Scored:
    """Score texts by name, each one document, cut into rows as held-out documents are."""
    context, tokenizer = loaded.recipe.model.context, loaded.tokenizer
    documents = [as_array(tokenizer, text, np.dtype(np.int32)) for text in texts.values()]
    ids = np.array([len(document) for document in documents], np.int64)
    windows = list(pack([ids], context))
    selection = Selection(
        source="text",
        pieces=np.concatenate([pieces for pieces, _ in windows]),
        row_starts=np.concatenate([[0], np.cumsum(np.concatenate([counts for _, counts in windows]))]),
        names=tuple(texts),
        languages=("und",) * len(texts),
        bytes=np.array([len(text.encode()) for text in texts.values()], np.int64),
        ids=ids,
        targets=ids - 1,
        places=np.zeros((len(ids), 2), np.int64),
        lossless=tokenizer.lossless,
    )
    batches = _batches(selection, documents, tokenizer, context, _rows(loaded.model))
    return _score(loaded.model, selection, batches, progress)


def _batches(
    selection: Selection, documents: list[np.ndarray], tokenizer: Tokenizer, context: int, rows: int
) -> Iterator[Batch]:
    for first in range(0, selection.rows, rows):
        filled = []
        for row in range(first, min(first + rows, selection.rows)):
            pieces = selection.pieces[selection.row_starts[row] : selection.row_starts[row + 1]]
            places = pieces[["document", "start", "pairs"]].tolist()
            filled.append([documents[number][start : start + pairs + 1] for number, start, pairs in places])
        yield causal(filled, [0] * len(filled), context, tokenizer.pad)


def _score(model: Decoder, selection: Selection, batches: Iterator[Batch], progress: Progress | None) -> Scored:
    def told() -> Iterator[Batch]:
        done = 0
        for batch in batches:
            yield batch
            done += batch.tokens
            if progress:
                progress(f"scoring {selection.source}", done, selection.tokens)

    nats = document_nats(model, selection, told())
    if not np.isfinite(nats).all():
        raise RunError(
            f"{selection.source}: the loss is not finite; the weights or the dtype overflow (try --dtype float32)"
        )
    return Scored(
        selection.source, selection.names, selection.languages, nats, selection.targets, selection.bytes,
        selection.lossless,
    )  # fmt: skip


def _rows(model: Decoder) -> int:
    """Rows of a batch."""
    return max(1, BATCH_TOKENS.get(model.embedding_VD.device.type, 65_536) // model.config.context)


def _ratio(amounts: np.ndarray, sizes: np.ndarray) -> Interval:
    """Sum over sum, with its interval over documents."""
    interval = bootstrap_interval if len(sizes) <= BOOTSTRAP_DOCUMENTS else mean_interval
    return interval(amounts / sizes, weights=sizes)
