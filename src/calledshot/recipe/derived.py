"""What follows from a recipe without being written in it: the model's full shape, the sources' names."""

import re
from dataclasses import asdict, dataclass

from .schema import Data, Model, Source

GATED = ("swiglu", "geglu")
"""Kinds of feed-forward with three matrices; the others have two."""
RELATIVE_BUCKETS = 32
"""Entries of T5's table for each head."""


@dataclass(frozen=True)
class Stack:
    """What one stack of blocks is made of."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    ordered: bool
    """Whether tokens see only what comes before."""
    cross_width: int = 0
    """Width of the encoder's output that its blocks attend to; 0 where they do not."""


@dataclass(frozen=True)
class Shape(Model):
    """The model's keys with `head_width`, `hidden`, `expert_hidden` and the encoder's resolved, the encoder's being 0
    where there is none; `vocabulary` stays 0 where the tokenizer decides it."""

    @property
    def decoder(self) -> Stack:
        """The stack that every topology has."""
        return Stack(self.layers, self.width, self.heads, self.kv_heads, self.hidden, True, self.encoder_width)

    @property
    def encoder(self) -> Stack | None:
        """The other stack: heads of the same width, as many as the decoder's where it is as wide, else as fit in its
        width; as many query heads a key head."""
        if self.topology != "encoder-decoder":
            return None
        heads = self.heads if self.encoder_width == self.width else self.encoder_width // self.head_width
        kv_heads = max(1, heads * self.kv_heads // self.heads)
        return Stack(self.encoder_layers, self.encoder_width, heads, kv_heads, self.encoder_hidden, False)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Both, or the one."""
        return (self.decoder,) if self.encoder is None else (self.encoder, self.decoder)

    @property
    def row_positions(self) -> int:
        """Tokens of one sequence: the decoder's and the encoder's."""
        return self.context + self.encoder_context


def shape(model: Model) -> Shape:
    """The full shape: C = width / heads; F = 8/3 of the width where the feed-forward is gated, else 4 times it, rounded
    up to a multiple of 64; an expert's F = hidden / top_k, rounded up to a multiple of 8; where they are 0."""
    keys = asdict(model)
    keys["head_width"] = model.head_width or model.width // model.heads

    def feed_forward(width: int) -> int:
        return -(-8 * width // (3 * 64)) * 64 if model.feed_forward in GATED else -(-4 * width // 64) * 64

    keys["hidden"] = model.hidden or feed_forward(model.width)
    if model.experts:
        keys["expert_hidden"] = model.expert_hidden or -(-keys["hidden"] // (8 * model.top_k)) * 8
    two = model.topology == "encoder-decoder"
    width = model.encoder_width or model.width
    keys["encoder_width"] = width if two else 0
    keys["encoder_layers"] = (model.encoder_layers or model.layers) if two else 0
    keys["encoder_context"] = (model.encoder_context or model.context) if two else 0
    scaled = -(-model.hidden * width // (model.width * 64)) * 64 if width != model.width else model.hidden
    keys["encoder_hidden"] = (model.encoder_hidden or scaled or feed_forward(width)) if two else 0
    return Shape(**keys)


def pooled(model: Shape) -> list[int]:
    """Positions that each layer of the encoder works on."""
    halvings = model.encoder_pooling.bit_length() - 1
    layers, length, lengths = model.encoder_layers, model.encoder_context, []
    for number in range(halvings + 1):
        if number:
            length = -(-length // 2)
        lengths += [length] * (layers * (number + 1) // (halvings + 1) - layers * number // (halvings + 1))
    return lengths


def source_name(source: Source) -> str:
    """How tables call a source: its own name, else the data set's, file's or folder's in its path."""
    if source.name:
        return source.name
    if source.path.startswith("hf:"):
        return "/".join(source.path[3:].split("/")[1:2]) or source.path[3:]
    parts = [part for part in re.split(r"[/\\]", source.path) if part not in ("", ".", "..")]
    fixed = [part for part in parts if not set(part) & set("*?[")] or ["text"]
    last = fixed[-1]
    return (last.split(".")[0] or last) if fixed == parts else last


def source_names(data: Data) -> tuple[str, ...]:
    """The name of each source, in order."""
    return tuple(source_name(source) for source in data.sources)
