"""What an objective asks of the data: where its tokens are in the vocabulary, and how rows are filled."""

from __future__ import annotations

from dataclasses import replace

from calledshot.data.tokenizer import Tokenizer
from calledshot.objective import Denoising, Frame, Specials
from calledshot.recipe import Recipe, shape
from calledshot.recipe.objectives import MODES, denoisers


def frame_of(recipe: Recipe, tokenizer: Tokenizer) -> Frame:
    """The rows of the recipe's topology."""
    model = shape(recipe.model)
    modes = {mode: tokenizer.special[f"<|{mode}|>"] for mode in MODES}
    specials = Specials(tokenizer.begin, tokenizer.end, tokenizer.pad, tuple(tokenizer.sentinels), modes)
    return Frame(model.topology, model.context, model.encoder_context, specials, model.encoder_pooling)


def shortened(frame: Frame, positions: int) -> Frame:
    """The frame with no more than so many positions in either stack."""
    return replace(frame, context=min(frame.context, positions), encoder_context=min(frame.encoder_context, positions))


def denoising_of(recipe: Recipe, tokenizer: Tokenizer) -> Denoising:
    """The recipe's objective in its topology."""
    return Denoising(denoisers(recipe.objective), frame_of(recipe, tokenizer))
