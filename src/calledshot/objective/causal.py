"""The causal objective: each token is predicted from those before it in its document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calledshot.objective.batch import PADDING, Batch


def causal(rows: Sequence[Sequence[np.ndarray]], sources: Sequence[int], context: int, pad: int) -> Batch:
    """Lay pieces of documents out as a batch.

    A piece of L + 1 ids, any integer dtype, gives L (input, target) pairs; the pieces of a row give at most `context`
    pairs together. What is left of a row is padding without loss.
    """
    shape = (len(rows), context)
    inputs = np.full(shape, pad, np.int32)
    targets = np.full(shape, pad, np.int32)
    loss_weights = np.zeros(shape, np.float32)
    documents = np.full(shape, PADDING, np.int32)
    positions = np.zeros(shape, np.int32)
    count = np.arange(context, dtype=np.int32)
    for row, pieces in enumerate(rows):
        start = 0
        for index, ids in enumerate(pieces):
            stop = start + len(ids) - 1
            inputs[row, start:stop] = ids[:-1]
            targets[row, start:stop] = ids[1:]
            documents[row, start:stop] = index
            positions[row, start:stop] = count[: stop - start]
            start = stop
        loss_weights[row, :start] = 1.0
    regions = np.zeros(shape, np.int8)
    return Batch(inputs, targets, loss_weights, documents, positions, regions, np.asarray(sources, np.int32))
