"""The trunk: layers, attention and masks, loss, cache, generation; Hugging Face in and out."""

from calledshot.model.decoder import Block, Cache, Decoder
from calledshot.model.evaluate import batch_nats, document_nats

__all__ = ["Block", "Cache", "Decoder", "batch_nats", "document_nats"]
