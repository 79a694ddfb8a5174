"""An evaluation of one checkpoint: what it says, how it is kept, how two are compared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calledshot.data import Asking
from calledshot.evals.compression import compressors
from calledshot.evals.scoring import (
    Predict,
    Progress,
    Scored,
    Split,
    prepared_data,
    read_texts,
    score_prepared,
    score_texts,
)
from calledshot.recipe import RunError, UsageError
from calledshot.rundir import RunDirectory, read_json, utc_now
from calledshot.stats import Comparison, paired_comparison
from calledshot.training import load_model


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on some documents."""

    run: RunDirectory
    step: int
    kind: str
    """`held-out`, `train` or `text`; with `-suffixes` or `-gaps` where only these were predicted."""
    dtype: str
    scored: dict[str, Scored]
    """By source."""
    detail: str = ""
    """What tells it from others of its kind, in its identifier."""
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    """Bits per byte of other compressors on the same documents, by source and name."""
    pieces: int = 0
    """Tokens of the longest pieces whose suffixes were predicted: those of models with other pieces are other bytes. 0
    where no suffixes were."""

    @property
    def identifier(self) -> str:
        """Name of its files under evals/; the same question has the same name."""
        return f"{self.kind}{self.detail}-step-{self.step:07d}"

    @property
    def path(self) -> Path:
        """Its summary; the documents are beside it, as .jsonl."""
        return self.run.path / "evals" / f"{self.identifier}.json"

    def summary(self) -> dict[str, Any]:
        """As it is kept and printed."""
        sources = {}
        for source, one in self.scored.items():
            languages = {language: measure.record() for language, measure in one.by_language().items()}
            sources[source] = one.measure().record() | ({"languages": languages} if languages else {})
        summary: dict[str, Any] = {"kind": self.kind, "step": self.step, "dtype": self.dtype, "sources": sources}
        summary |= {"pieces": self.pieces} if self.pieces else {}
        return summary | ({"references": self.references} if self.references else {})

    def save(self) -> None:
        """Write evals/ID.jsonl, a row a document, and then its summary evals/ID.json. An earlier answer is replaced;
        what it says of other compressors, which are not asked each time, stays."""
        rows = []
        for one in self.scored.values():
            columns = one.names, one.languages, one.nats.tolist(), one.tokens.tolist(), one.bytes.tolist()
            for name, language, nats, tokens, size in zip(*columns, strict=True):
                rows.append(
                    {"source": one.source, "document": name, "language": language,
                     "nats": nats, "tokens": tokens, "bytes": size}
                )  # fmt: skip
        summary = {"time": utc_now(), **self.summary()}
        known: dict[str, dict[str, float]] = {}
        with suppress(RunError):  # a damaged one is replaced
            known = read_json(self.path, {}).get("references", {})
        if references := known | self.references:
            summary["references"] = references
        self.run.save_eval(self.identifier, summary, rows)


def evaluate(
    run: RunDirectory,
    step: int | None = None,
    *,
    sources: Sequence[str] = (),
    tokens: int = 0,
    split: Split = "held-out",
    predict: Predict = "auto",
    texts: Sequence[Path] = (),
    with_compressors: bool = False,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a checkpoint (the newest) on its run's held-out documents, or on text files alone where some are given.

    `tokens` bounds what is read of each source (0 reads all). `dtype` is `float32`, `bfloat16` or `auto`: what the run
    was trained in, so that the numbers are those of its own last measurement. UsageError where the run's prepared data
    are not here: they are never made anew for this.
    """
    check_question(tokens=tokens, split=split, predict=predict, texts=texts, with_compressors=with_compressors)
    read = read_texts(texts)
    prepared = None if read else prepared_data(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = trained_dtype(run, device) if dtype == "auto" else dtype
    loaded = load_model(run, step, dtype=getattr(torch, dtype), device=device)
    asked = ("whole" if loaded.model.encoder is None else "suffixes") if predict == "auto" else predict
    kind = ("text" if prepared is None else split) + ("" if asked == "whole" else f"-{asked}")
    pieces = Asking(loaded.recipe, loaded.tokenizer, True).piece if asked == "suffixes" else 0
    if prepared is None:
        digest = hashlib.sha256("\0".join(read.values()).encode()).hexdigest()[:8]
        scored = {"text": score_texts(loaded, read, progress)}
        return Evaluation(run, loaded.step, kind, dtype, scored, f"-{digest}", pieces=pieces)
    scored = score_prepared(
        loaded, prepared, sources=sources, tokens=tokens, split=split, predict=predict, progress=progress
    )
    references = {source: compressors(prepared, source, progress) for source in scored} if with_compressors else {}
    detail = "".join(f"-{re.sub(r'[^0-9A-Za-z_.]+', '_', part)}" for part in (*sources, str(tokens or "")) if part)
    return Evaluation(run, loaded.step, kind, dtype, scored, detail, references, pieces)


def check_question(
    *, tokens: int, split: Split, predict: Predict, texts: Sequence[Path], with_compressors: bool
) -> None:
    """UsageError where what is asked does not go together, whatever the run."""
    if tokens < 0:
        raise UsageError(f"--tokens {tokens}: must be 0, which reads all, or more")
    if with_compressors and (tokens or texts or split != "held-out"):
        raise UsageError("--compressors reads all held-out documents: leave out --tokens, --text and --split")
    if predict != "auto" and (texts or with_compressors):
        raise UsageError(f"--predict {predict} is of held-out documents: leave out --text and --compressors")
    if predict == "gaps" and tokens:
        raise UsageError("--predict gaps takes the same gaps always: leave out --tokens")
    read_texts(texts)


def trained_dtype(run: RunDirectory, device: str) -> str:
    """The dtype that the run was last trained in on such a device; else float32 on CPUs, bfloat16 on GPUs."""
    machines = run.load("probes").get("machines", {}).values()
    known = [str(one["dtype"]) for one in machines if one["device"] == device]
    return known[-1] if known else "float32" if device == "cpu" else "bfloat16"


def compare(a: Scored, b: Scored) -> Comparison | None:
    """Bits per byte of `a` less those of `b`, paired by document; None where these are not the same documents, or where
    a tokenizer loses text."""
    if not (a.lossless and b.lossless) or a.names != b.names or not np.array_equal(a.bytes, b.bytes):
        return None
    bits_a, bits_b = (one.nats / np.log(2) / one.bytes for one in (a, b))
    clusters = a.names if len(set(a.names)) < len(a.names) else None
    return paired_comparison(bits_a, bits_b, weights=a.bytes, clusters=clusters)
