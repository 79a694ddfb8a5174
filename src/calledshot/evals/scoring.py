"""Loss, perplexity and bits per byte of whole documents: the held-out ones of a run's data, or any text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calledshot.data import Asking, HeldOut, Infilling, Prepared, Selection
from calledshot.data.tokenizer import as_array
from calledshot.model import Decoder
from calledshot.model.evaluate import document_nats
from calledshot.objective import Batch
from calledshot.recipe import RunError, UsageError
from calledshot.recipe.objectives import denoisers
from calledshot.rundir import RunDirectory
from calledshot.stats import Interval, bootstrap_interval, mean_interval
from calledshot.training import Loaded

BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Positions in one forward pass."""
BOOTSTRAP_DOCUMENTS = 2000
"""Up to so many documents intervals are bootstrapped; past it Student's t says the same at once."""

Split = Literal["held-out", "train"]
Predict = Literal["auto", "whole", "suffixes", "gaps"]
"""What is predicted of a document: all of it; of each piece the part after a prefix, which every topology can and of
the same bytes; a stretch in its middle, from both sides by models that learned to fill gaps and else from the left.
`auto` is all of it, or suffixes where there is an encoder."""
ROW = 4096
"""Positions of the rows that documents are put in, or multiples where one is longer, whatever more the model reads."""
GAPS = 512
"""Gaps of each source."""
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
        names = [name for name, one in zip(self.names, mine, strict=True) if one]
        bits = Interval(math.nan, -math.inf, math.inf)
        if self.lossless:
            bits = _ratio(nats / math.log(2), size, names)
        loss = _ratio(nats, tokens, names)
        return Measure(len(set(names)), int(tokens.sum()), int(size.sum()), loss, bits)

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
    predict: Predict = "auto",
    progress: Progress | None = None,
) -> dict[str, Scored]:
    """Documents of the sources (all that have some) by source, about `tokens` targets each, all for 0."""
    if split == "train":
        as_if = tuple(replace(source, held_out=source.train) for source in prepared.sources)
        prepared = replace(prepared, sources=as_if)
    suffixes = None if predict in ("auto", "gaps") else predict == "suffixes"
    held_out = HeldOut(prepared, loaded.recipe, suffixes, shortest_row=ROW)
    if not held_out.sources:
        raise UsageError(f"{prepared.path}: no source holds documents out; evaluate other text with --text FILE")
    for name in sources:
        prepared.source(name)
    rows = _rows(loaded.model)
    scored = {}
    for name in sources or held_out.sources:
        if predict == "gaps":
            scored[name] = _score_gaps(loaded, prepared, name, progress)
            continue
        selection = held_out.select(name, tokens)
        batches = held_out.batches(name, tokens, rows)
        scored[name] = _score(loaded.model, selection, batches, progress)
    return scored


def _score_gaps(loaded: Loaded, prepared: Prepared, source: str, progress: Progress | None) -> Scored:
    gaps = Infilling(prepared, loaded.recipe, source, GAPS, longest_row=ROW)
    both_sides = any(one.kind == "span" for one in denoisers(loaded.recipe.objective))
    if not both_sides and loaded.model.encoder is not None:
        raise UsageError(f"{loaded.run.path}: an encoder-decoder that learned no gaps cannot fill any")
    selection = gaps.select(both_sides)
    return _score(loaded.model, selection, gaps.batches(both_sides, _rows(loaded.model)), progress)


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
    """Score texts by name, each one document, put to the model as held-out documents are."""
    asking = Asking(loaded.recipe, loaded.tokenizer, shortest_row=ROW)
    documents = [as_array(loaded.tokenizer, text, np.dtype(np.int32)) for text in texts.values()]

    def read(document: int, start: int, count: int) -> np.ndarray:
        return documents[document][start : start + count]

    ids = np.array([len(document) for document in documents], np.int64)
    size = np.array([len(text.encode()) for text in texts.values()], np.int64)
    selection = asking.select("text", list(texts), ["und"] * len(texts), ids, size, read)
    return _score(loaded.model, selection, asking.batches(selection, read, _rows(loaded.model)), progress)


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
    """Rows of a batch, of `ROW` positions at most."""
    longest = max(model.config.context, model.config.encoder_context)
    return max(1, BATCH_TOKENS.get(model.embedding_VD.device.type, 65_536) // min(longest, ROW))


def _ratio(amounts: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> Interval:
    """Sum over sum, with its interval over documents; what it costs to predict text is never below 0."""
    interval = bootstrap_interval if len(sizes) <= BOOTSTRAP_DOCUMENTS else mean_interval
    found = interval(amounts / sizes, weights=sizes, clusters=names if len(set(names)) < len(names) else None)
    return found if math.isinf(found.low) else replace(found, low=max(found.low, 0.0))
