"""A batch as tensors, and what held-out text costs a model, in nats: the one way to compute it, inside training and
after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from calledshot.data import Selection
from calledshot.model.collectives import gather_over
from calledshot.model.decoder import Decoder
from calledshot.model.encoder import EncoderInputs
from calledshot.objective import Batch


@dataclass(frozen=True)
class BatchTensors:
    """A batch on the model's device; all (B, T), ids int64."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    documents: Tensor
    regions: Tensor | None
    """None where all is causal."""
    encoder: EncoderInputs | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> BatchTensors:
        """From numpy arrays."""

        def tensor(array: np.ndarray, dtype: str | None = None) -> Tensor:
            return torch.from_numpy(array.astype(dtype) if dtype else array).to(device, non_blocking=True)

        encoded = batch.encoded
        return cls(
            tensor(batch.inputs, "int64"),
            tensor(batch.targets, "int64"),
            tensor(batch.loss_weights),
            tensor(batch.positions),
            tensor(batch.documents),
            tensor(batch.regions) if batch.regions.any() else None,
            None
            if encoded is None
            else EncoderInputs(tensor(encoded.inputs, "int64"), tensor(encoded.positions), tensor(encoded.documents)),
        )

    def rows(self, start: int, stop: int) -> BatchTensors:
        """Some rows."""
        part = slice(start, stop)
        encoder = self.encoder
        if encoder is not None:
            encoder = EncoderInputs(*(None if each is None else each[part] for each in vars(encoder).values()))
        cut = {name: each[part] for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **cut, encoder=encoder)

    def columns(self, part: int, parts: int) -> BatchTensors:
        """One of so many equal parts of each row's positions; no encoder's."""
        assert self.encoder is None
        cut = {name: each.chunk(parts, 1)[part] for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **cut)

    @property
    def reading(self) -> dict[str, Tensor | EncoderInputs | None]:
        """What `Decoder.hidden_states` wants besides the inputs."""
        return {
            "positions_BT": self.positions,
            "documents_BT": self.documents,
            "regions_BT": self.regions,
            "encoder_inputs": self.encoder,
        }


@torch.no_grad()
def batch_nats(model: Decoder, batch: Batch) -> np.ndarray:
    """Cross-entropy of every target in nats, float32 (B, T), in the model's dtype and on its device.

    Padding has numbers too, without meaning: `batch.loss_weights` is 0 there. All ranks that share the model call it
    alike, and get the same.
    """
    tensors, context = BatchTensors.of(batch, model.embedding_VD.device), model.context
    if context is not None:
        tensors = tensors.columns(context.rank, context.size)
    losses_BT = model.token_losses(tensors.inputs, tensors.targets, **tensors.reading)
    if context is not None:
        losses_BT = gather_over(losses_BT, context, 1)
    return losses_BT.cpu().numpy()


def document_nats(model: Decoder, selection: Selection, batches: Iterable[Batch]) -> np.ndarray:
    """Nats of each document of a selection, float64 (D,); `batches` holds its rows in order, any number at a time."""
    nats = np.zeros(len(selection.ids))
    row = 0
    for batch in batches:
        nats += selection.nats_by_document(row, batch, batch_nats(model, batch))
        row += len(batch.documents)
    return nats
