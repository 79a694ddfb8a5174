"""A trained model from its run directory."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calledshot.data import Tokenizer
from calledshot.model import Decoder, continuing
from calledshot.recipe import Recipe, UsageError, from_dict
from calledshot.rundir import RunDirectory
from calledshot.training import state


@dataclass(frozen=True)
class Loaded:
    """A model ready to be used, and what it was trained as."""

    model: Decoder
    tokenizer: Tokenizer
    recipe: Recipe
    """As resolved: `model.vocabulary` is never 0."""
    step: int
    run: RunDirectory


def run_recipe(run: RunDirectory) -> Recipe:
    """The recipe that a run was started with. UsageError when it has none (another trainer's)."""
    text = run.recipe_toml()
    if not text:
        raise UsageError(f"{run.path}: has no recipe.toml; only runs of `shot train` can be opened so")
    return from_dict(tomllib.loads(text), file=str(run.path / "recipe.toml"))


def sized(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the vocabulary that its tokenizer asks for. UsageError when the model's is too small for it."""
    if recipe.model.vocabulary == 0:
        return replace(recipe, model=replace(recipe.model, vocabulary=-(-tokenizer.size // 64) * 64))
    if tokenizer.size > recipe.model.vocabulary:
        raise UsageError(
            f"model.vocabulary = {recipe.model.vocabulary}: the tokenizer has {tokenizer.size} entries; "
            "raise it, or write 0 to take what the tokenizer needs"
        )
    return recipe


def load_model(
    run: Path | RunDirectory, step: int | None = None, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Loaded:
    """The model of a run at `step` (the newest whole checkpoint), for use: no gradients, in `dtype` (float32).

    UsageError when the run has no checkpoint; RunError when the one asked for is damaged.
    """
    directory = run if isinstance(run, RunDirectory) else RunDirectory.open(run)
    recipe = run_recipe(directory)
    found = state.find(directory, step)
    if found is None:
        raise UsageError(f"{directory.path}: has no checkpoint yet; `shot resume {directory.name}` trains on")
    tokenizer = Tokenizer.load(directory.path / "tokenizer.json")
    recipe = sized(recipe, tokenizer)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    model.to_empty(device=device)
    targets = {name: tensor.data for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    state.load_into(targets, found.path)
    model.requires_grad_(False).eval().to(dtype or torch.float32)
    model.blocked_attention, model.reading = False, continuing(recipe, tokenizer)
    return Loaded(model, tokenizer, recipe, found.step, directory)
