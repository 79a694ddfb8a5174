"""How a prompt is put to a model so that it goes on, after what its objective taught it."""

from __future__ import annotations

from calledshot.data import Tokenizer
from calledshot.model.decoder import Reading
from calledshot.recipe import Recipe
from calledshot.recipe.objectives import denoisers


def continuing(recipe: Recipe, tokenizer: Tokenizer) -> Reading:
    """For text that goes on: as causal text where the model is a decoder that knew some; else as a prefix, with the
    mode token of that task; else, where there were only spans, as a text whose end is missing.
    """
    tasks = {task.kind: task for task in reversed(denoisers(recipe.objective))}
    topology = recipe.model.topology
    if topology == "decoder" and "causal" in tasks:
        return Reading(before=_mode(tasks["causal"].mode, tokenizer))
    task = tasks.get("prefix") or tasks.get("span") or tasks["causal"]
    begin = (tokenizer.begin,) if topology == "encoder-decoder" else ()
    gap = (tokenizer.sentinels[0],) if task.kind == "span" else ()
    two_way = topology == "prefix" and task.kind != "causal"
    return Reading(_mode(task.mode, tokenizer), gap, (*begin, *gap), two_way)


def _mode(name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return (tokenizer.special[f"<|{name}|>"],) if name else ()
