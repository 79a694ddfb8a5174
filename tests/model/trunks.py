"""Models and layouts that the tests of the trunk share."""

import torch
from torch import Tensor

from calledshot.model import Decoder, EncoderInputs
from calledshot.recipe import schema

TOPOLOGIES = {
    "decoder": {},
    "prefix": {"topology": "prefix"},
    "encoder-decoder": {"topology": "encoder-decoder"},
    "narrow encoder": {"topology": "encoder-decoder", "encoder_layers": 3, "encoder_width": 16},
    "pooling encoder": {"topology": "encoder-decoder", "encoder_layers": 3, "encoder_pooling": 4},
}


def config(topology: str = "decoder", **keys: object) -> schema.Model:
    """Two small layers of a topology above."""
    small = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 64, "vocabulary": 96, "context": 128}
    return schema.Model(**{**small, **TOPOLOGIES[topology], **keys})


def random_model(model: schema.Model, *, blocked: bool = True, seed: int = 0) -> Decoder:
    """Every parameter random and away from zero."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            scale = 1.0 if "relative_bias" in name else parameter.size(-1) ** -0.5
            parameter.data.normal_(0.0, scale, generator=generator)
    decoder.blocked_attention = blocked
    return decoder


def row(*lengths: int, width: int) -> tuple[Tensor, Tensor]:
    """Documents and positions (1, width) of documents of so many tokens one after another, padded."""
    documents_1T, positions_1T = torch.full((1, width), -1), torch.zeros(1, width, dtype=torch.long)
    start = 0
    for index, length in enumerate(lengths):
        documents_1T[0, start : start + length] = index
        positions_1T[0, start : start + length] = torch.arange(length)
        start += length
    return documents_1T, positions_1T


def encoder_row(tokens_BS: Tensor, *lengths: int) -> EncoderInputs:
    """One row of encoder inputs that holds documents of so many tokens."""
    documents_1S, positions_1S = row(*lengths, width=tokens_BS.size(1))
    return EncoderInputs(tokens_BS, positions_1S, documents_1S)
