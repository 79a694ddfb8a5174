"""Small models with random weights, for comparisons with `transformers`."""

from __future__ import annotations

import torch

from calledshot.model import Decoder
from calledshot.recipe import schema

VOCABULARY = 640


def sized(model: schema.Model, context: int = 64) -> schema.Model:
    return schema.Model(**{**vars(model), "vocabulary": VOCABULARY, "context": context})


def random_decoder(config: schema.Model) -> Decoder:
    """Every parameter random and away from zero, gains and head too, at scales that keep the logits near one."""
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0.0, parameter.size(-1) ** -0.5, generator=generator)
    return decoder.requires_grad_(False).eval()


def loaded(config: schema.Model, state: dict[str, torch.Tensor]) -> Decoder:
    decoder = Decoder(config)
    decoder.load_state_dict(state)
    return decoder.requires_grad_(False).eval()


def randomize(theirs: torch.nn.Module) -> torch.nn.Module:
    """The same for a model of `transformers`, tied weights once."""
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0.0, parameter.size(-1) ** -0.5, generator=generator)
    return theirs.requires_grad_(False).eval()
