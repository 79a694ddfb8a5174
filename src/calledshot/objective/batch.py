"""What one step of the model sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PADDING = -1
"""`documents` where a row holds nothing."""


@dataclass(frozen=True)
class Encoded:
    """What the encoder of an encoder-decoder reads: B rows of S positions, all arrays (B, S).

    A query sees every key of its document; a query of the decoder sees every encoded token of the document of the same
    index in its row.
    """

    inputs: np.ndarray
    """int32 token ids; the pad id on padding."""
    documents: np.ndarray
    """int32 index of the piece within its row, from 0; -1 on padding."""
    positions: np.ndarray
    """int32 position; restarts at 0 with each piece, 0 on padding."""


@dataclass(frozen=True)
class Batch:
    """B rows of T positions; every array but `sources` is (B, T).

    The query at t may see the key at s if and only if `documents[t] == documents[s]` and either `s <= t` or
    `regions[t] == regions[s] > 0`.
    """

    inputs: np.ndarray
    """int32 token ids; the pad id on padding."""
    targets: np.ndarray
    """int32 ids to predict; the pad id on padding."""
    loss_weights: np.ndarray
    """float32 weight of each target's loss; 0 on padding."""
    documents: np.ndarray
    """int32 index of the piece within its row, from 0; -1 on padding."""
    positions: np.ndarray
    """int32 RoPE position; restarts at 0 with each piece, 0 on padding."""
    regions: np.ndarray
    """int8; 0 is causal, tokens of one region above 0 see each other both ways: 1 is a document's prefix."""
    sources: np.ndarray
    """int32 (B,): index of each row's source in the mixture."""
    encoded: Encoded | None = None
    """What the encoder reads, for the encoder-decoder topology."""

    @property
    def size(self) -> int:
        """Positions, the encoder's with them and padding included: what a step is counted by."""
        return self.inputs.size + (0 if self.encoded is None else self.encoded.inputs.size)

    @property
    def tokens(self) -> int:
        """Targets that carry loss."""
        return int(np.count_nonzero(self.loss_weights))
