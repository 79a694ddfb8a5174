"""What people ask about data: what a prepared folder holds, and what the model sees at a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calledshot.data.batches import Batches
from calledshot.data.frames import denoising_of
from calledshot.data.plans import plan
from calledshot.data.prepare import prepared_folder
from calledshot.data.prepared import MANIFEST, Prepared, Split
from calledshot.data.tokenizer import Tokenizer
from calledshot.objective import Batch
from calledshot.recipe import Recipe, RunError, UsageError, cost
from calledshot.rundir import RunDirectory


@dataclass(frozen=True)
class Segment:
    """A stretch of a row in which every token belongs to the same piece, and is seen and weighted alike."""

    piece: int
    """Index of the piece within its row."""
    weight: float
    """Weight of the loss of predicting these tokens; 0 for a piece's first, which nothing in the row predicts."""
    region: int
    """0 where tokens see what comes before them, above 0 where those of one region see each other."""
    encoded: bool
    """Whether the encoder reads them."""
    tokens: tuple[str, ...]
    """The tokens, special ones spelled out. One that ends within a character is joined with those that complete it."""


def segments(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[Segment]:
    """A row's pieces in order, each from its first input to its last target; padding is left out. What the encoder
    reads of a piece comes before what the decoder does."""
    documents = batch.documents[row]
    for piece in range(int(documents.max(initial=-1)) + 1):
        if batch.encoded is not None:
            read = batch.encoded.inputs[row, batch.encoded.documents[row] == piece].tolist()
            yield Segment(piece, 0.0, 1, True, tuple(_characters(read, tokenizer)))
        places = np.flatnonzero(documents == piece)
        ids = [int(batch.inputs[row, places[0]]), *batch.targets[row, places].tolist()]
        weights = [0.0, *batch.loss_weights[row, places].tolist()]
        regions = [*batch.regions[row, places].tolist(), 0]
        seen = list(zip(weights, regions, strict=True))
        start = 0
        for stop in range(1, len(ids) + 1):
            if stop == len(ids) or seen[stop] != seen[start]:
                yield Segment(piece, *seen[start], False, tuple(_characters(ids[start:stop], tokenizer)))
                start = stop


def _characters(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    waiting = b""
    for number, token in enumerate(ids):
        waiting += tokenizer.decode_bytes([token])
        try:
            text = waiting.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and number + 1 < len(ids):
                continue
            text = waiting.decode("utf-8", "replace")
        yield text
        waiting = b""


def summary(prepared: Prepared, recipe: Recipe | None = None) -> dict[str, Any]:
    """What a prepared folder holds, by source; with a recipe also how its context packs. JSON's own types."""
    rows = []
    for source in prepared.sources:
        tokens = source.train.tokens + source.held_out.tokens
        row: dict[str, Any] = {
            "name": source.name,
            "path": source.path,
            "revision": source.revision,
            "bytes_per_token": source.bytes_per_token,
            "train": _counts(source.train, prepared.path),
            "held_out": _counts(source.held_out, prepared.path),
            "held_out_share": source.held_out.tokens / tokens if tokens else 0.0,
            "skipped": source.skipped,
        }
        if recipe is not None:
            made = plan(prepared, source, denoising_of(recipe, prepared.tokenizer))
            row |= {"context": made.context, "sequences": made.rows, "packing_loss": made.packing_loss}
        rows.append(row)
    tokenizer = prepared.tokenizer
    return {
        "folder": str(prepared.path),
        "key": prepared.key,
        "tokenizer": {"size": tokenizer.size, "special": len(tokenizer.special), "encoder": tokenizer.encoder},
        "sources": rows,
    }


def _counts(split: Split, folder: Path) -> dict[str, Any]:
    counts = {"documents": split.documents, "tokens": split.tokens, "bytes": split.bytes}
    return {**counts, "shards": len(split.shards), "languages": split.languages(folder)}


def find_prepared(reference: Recipe | Path, lab: Path, verify: bool | None = None) -> Prepared:
    """The prepared data of a recipe, or in a folder. UsageError where nothing is prepared."""
    folder = reference if isinstance(reference, Path) else prepared_folder(reference, lab)
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder}: nothing is prepared there; `shot data build RECIPE` does it")
    return Prepared.open(folder, verify)


def run_batches(run: RunDirectory, recipe: Recipe) -> Batches:
    """The batches that a run was trained on. RunError where its prepared data are gone."""
    folder = run.load("data").get("folder")
    if not folder:
        raise UsageError(f"{run.path}: has no data.json, so which data it read is not known")
    path = run.path.absolute().parent.parent / "data" / folder
    if not path.is_dir():
        raise RunError(
            f"{path}: the data that {run.name} was trained on are gone; `shot data build {run.name}/recipe.toml`"
        )
    prepared = Prepared.open(path)
    if not recipe.model.vocabulary:
        size = -(-prepared.tokenizer.size // 64) * 64
        recipe = replace(recipe, model=replace(recipe.model, vocabulary=size))
    steps = run.load("probes").get("steps") or cost(recipe).steps
    skips = [int(row["step"]) for row in run.rows("skips") if "step" in row]
    return Batches(prepared, recipe, steps=steps, skips=skips)
