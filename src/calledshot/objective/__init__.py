"""Documents become inputs, targets, loss weights and, for every token, what its mask is made of."""

from calledshot.objective.batch import PADDING, Batch, Encoded
from calledshot.objective.causal import causal

__all__ = ["PADDING", "Batch", "Encoded", "causal"]
