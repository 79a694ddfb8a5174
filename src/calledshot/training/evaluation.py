"""Held-out loss and samples inside the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from calledshot.data import HeldOut, Tokenizer
from calledshot.model import Decoder, batch_nats
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
                "bits_per_byte": score.bits_per_byte if score.bytes else None,
                "bytes_per_token": score.bytes / score.tokens if score.tokens else None,
                "tokens_evaluated": score.tokens,
                "bytes_evaluated": score.bytes,
                "documents": score.documents,
                "whole": selection.tokens == held_out.select(source, 0).tokens,
            }
        )
    return rows


def write_samples(model: Decoder, tokenizer: Tokenizer, recipe: Recipe, run: RunDirectory, step: int) -> None:
    """Greedy completions of the recipe's prompts, one row of samples.jsonl each."""
    for prompt in recipe.evals.prompts:
        ids = [tokenizer.begin, *tokenizer.encode(prompt)][-recipe.model.context :]
        room = min(recipe.evals.sample_tokens, recipe.model.context - len(ids))
        text = tokenizer.decode(complete(model, ids, room, tokenizer.end))
        run.writer("samples").append({"step": step, "prompt": prompt, "text": text})


@torch.no_grad()
def complete(model: Decoder, ids: list[int], count: int, end: int) -> list[int]:
    """The likeliest continuation, token by token, up to `count` tokens or the end token."""
    device = model.embedding_VD.device
    cache = model.new_cache(1, len(ids) + count)
    tokens, position, made = torch.tensor([ids], device=device), 0, []
    for _ in range(count):
        positions = torch.arange(position, position + tokens.size(1), device=device)[None]
        logits = model.logits(model.hidden_states(tokens, positions, cache=cache)[:, -1])
        position += tokens.size(1)
        token = int(logits.argmax(-1))
        if token == end:
            break
        made.append(token)
        tokens = torch.tensor([[token]], device=device)
    return made
