"""Held-out loss and samples inside the loop."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from calledshot.data import HeldOut, Tokenizer
from calledshot.model import Request, Sampling, banned_tokens, generate
from calledshot.rundir import RunDirectory
from calledshot.training.engine import Engine
from calledshot.training.stop import Stop


def evaluate(engine: Engine, held_out: HeldOut, tokens: int, stop: Stop) -> list[dict[str, Any]]:
    """One row of validation.jsonl a source, over about `tokens` held-out tokens each (all for 0), the same on all
    ranks, which take turns with the batches.

    A stop that is asked for ends it early: the sources finished until then are returned.
    """
    world, micro_rows, rows = engine.world, engine.micro_rows, []
    for source in held_out.sources:
        selection = held_out.select(source, tokens)
        nats = np.zeros(len(selection.ids))
        batches = enumerate(held_out.batches(source, tokens, micro_rows))
        while turns := list(itertools.islice(batches, world.layout.data)):
            if world.any(stop.requested)[0]:
                return rows
            # A rank that has none left does the last one once more: under FSDP all have to take part.
            number, batch = turns[min(world.data_rank, len(turns) - 1)]
            found = engine.nats(batch)
            if world.data_rank < len(turns) and world.speaks_for_data:
                nats += selection.nats_by_document(number * micro_rows, batch, found)
        if world.size > 1:
            nats = np.array(world.add(nats.tolist()))
        score = selection.score(nats)
        rows.append(
            {
                "source": source,
                "loss": score.loss,
                "bits_per_byte": None if math.isnan(score.bits_per_byte) else score.bits_per_byte,
                "bytes_per_token": score.bytes / score.tokens if score.tokens else None,
                "tokens_evaluated": score.tokens,
                "bytes_evaluated": score.bytes,
                "documents": score.documents,
                "predicted": "suffixes" if held_out.asking.suffixes else "whole",
                "whole": selection.tokens == held_out.select(source, 0).tokens,
            }
        )
    return rows


def write_samples(engine: Engine, tokenizer: Tokenizer, run: RunDirectory, step: int) -> None:
    """Completions of the recipe's prompts, drawn with the recipe's seed, one row of samples.jsonl each."""
    recipe = engine.recipe
    if not recipe.evals.prompts:
        return
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=recipe.seed)
    requests = []
    for prompt in recipe.evals.prompts:
        ids = [tokenizer.begin, *tokenizer.encode(prompt)][
            -(recipe.model.context - 4) :
        ]  # room for a mode token and a gap
        requests.append(Request(tuple(ids), recipe.evals.sample_tokens, sampling, frozenset({tokenizer.end})))
    with engine.generating() as model:
        completions = generate(model, requests, vocabulary=tokenizer.size, banned=banned_tokens(tokenizer))
    for prompt, made in zip(recipe.evals.prompts, completions, strict=True):
        run.writer("samples").append({"step": step, "prompt": prompt, "text": tokenizer.decode(made.tokens)})
