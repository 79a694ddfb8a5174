"""The trunk: layers, attention and masks, loss, cache, generation; Hugging Face in and out."""

from calledshot.model.decoder import Block, Cache, Decoder

__all__ = ["Block", "Cache", "Decoder"]
