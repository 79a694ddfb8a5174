"""Held-out loss and samples inside the loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from calledshot.data import HeldOut, Tokenizer
from calledshot.model import Decoder, Request, Sampling, banned_tokens, batch_nats, generate
from calledshot.recipe import Recipe
from calledshot.rundir import RunDirectory
from calledshot.training.stop import Stop


def evaluate(model: Decoder, held_out: HeldOut, tokens: int, stop: Stop, micro_rows: int) -> list[dict[str, Any]]:
    """One row of validation.jsonl a source, over about `tokens` held-out tokens each (all for 0).

    A stop that is asked for ends it early: the sources finished until then are returned.
    """
    rows = []
    for source in held_out.sources:
        selection = held_out.select(source, tokens)
        nats = np.zeros(len(selection.ids))
        for number, batch in enumerate(held_out.batches(source, tokens, micro_rows)):
            if stop.requested:
                return rows
            nats += selection.nats_by_document(number * micro_rows, batch, batch_nats(model, batch))
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


def write_samples(model: Decoder, tokenizer: Tokenizer, recipe: Recipe, run: RunDirectory, step: int) -> None:
    """Completions of the recipe's prompts, drawn with the recipe's seed, one row of samples.jsonl each."""
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=recipe.seed)
    requests = []
    for prompt in recipe.evals.prompts:
        ids = [tokenizer.begin, *tokenizer.encode(prompt)][
            -(recipe.model.context - 4) :
        ]  # room for a mode token and a gap
        requests.append(Request(tuple(ids), recipe.evals.sample_tokens, sampling, frozenset({tokenizer.end})))
    completions = generate(model, requests, vocabulary=tokenizer.size, banned=banned_tokens(tokenizer))
    for prompt, made in zip(recipe.evals.prompts, completions, strict=True):
        run.writer("samples").append({"step": step, "prompt": prompt, "text": tokenizer.decode(made.tokens)})
