"""What held-out text costs a model, in nats: the one way to compute it, inside training and after it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from calledshot.data import Selection
from calledshot.model.decoder import Decoder
from calledshot.objective import Batch


@torch.no_grad()
def batch_nats(model: Decoder, batch: Batch) -> np.ndarray:
    """Cross-entropy of every target in nats, float32 (B, T), in the model's dtype and on its device.

    Padding has numbers too, without meaning: `batch.loss_weights` is 0 there.
    """
    arrays = batch.inputs, batch.targets.astype(np.int64), batch.positions, batch.documents
    inputs, targets, positions, documents = (torch.from_numpy(each).to(model.embedding_VD.device) for each in arrays)
    return model.token_losses(inputs, targets, positions_BT=positions, documents_BT=documents).cpu().numpy()


def document_nats(model: Decoder, selection: Selection, batches: Iterable[Batch]) -> np.ndarray:
    """Nats of each document of a selection, float64 (D,); `batches` holds its rows in order, any number at a time."""
    nats = np.zeros(len(selection.ids))
    row = 0
    for batch in batches:
        nats += selection.nats_by_document(row, batch, batch_nats(model, batch))
        row += len(batch.documents)
    return nats
