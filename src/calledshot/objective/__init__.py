"""Documents become inputs, targets, loss weights and, for every token, what its mask is made of."""

from calledshot.objective.batch import PADDING, Batch, Encoded
from calledshot.objective.causal import causal
from calledshot.objective.denoising import Denoising, examples
from calledshot.objective.layout import Examples, Frame, Specials, lay_out

__all__ = ["PADDING", "Batch", "Denoising", "Encoded", "Examples", "Frame", "Specials", "causal", "examples", "lay_out"]
