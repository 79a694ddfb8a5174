"""Where a token stands: RoPE with its extensions, and T5's relative bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calledshot.recipe import schema

RELATIVE_BUCKETS = 32
RELATIVE_DISTANCE = 128
"""T5's settings: buckets of a table, and the distance from which all share the last."""
YARN_FAST, YARN_SLOW = 32.0, 1.0
LLAMA3_FAST, LLAMA3_SLOW = 4.0, 1.0
"""Turns over the original context from which a wavelength is kept, and below which it is stretched whole."""


def frequencies(model: schema.Model, width: int, *, encoder: bool = False) -> tuple[Tensor, float]:
    """Radians a position of each pair of a head of `width`, float32 (C / 2,), and the factor on cosines and sines.

    | `rope_scaling` | |
    |---|---|
    | none | base ** -(2i / C) (Su et al. 2021, arXiv 2104.09864) |
    | ntk | the base raised to base * factor ** (C / (C - 2)), so that the longest wavelength grows by the factor |
    | dynamic | to base * (factor * context / original - (factor - 1)) ** (C / (C - 2)) |
    | yarn | long wavelengths times the factor, short ones kept, a ramp over the pairs between; times 0.1 ln(f) + 1 |
    | llama3 | the same as Llama 3.1 to 3.3 have it: a ramp over the turns in the original context, times nothing |

    `transformers` raises the base of "dynamic" with the length at hand; here it is that of the whole context from the
    start, so that cached keys stay right. YaRN is Peng et al. 2023, arXiv 2309.00071, with the ramp of `transformers`'
    modeling_rope_utils.py.

    `rope_original_context` is the decoder's; an encoder's is to it as its context to the decoder's, since both grow by
    one factor. So "dynamic", which knows the growth alone, raises both bases alike.
    """
    base, factor = raised_base(model, width), model.rope_factor
    original = model.rope_original_context * (model.encoder_context / model.context if encoder else 1)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    kept = base**-exponents
    if model.rope_scaling == "llama3":
        turns = kept * (original / (2 * math.pi))
        ramp = ((turns - LLAMA3_SLOW) / (LLAMA3_FAST - LLAMA3_SLOW)).clamp(0, 1)
        return kept / factor * (1 - ramp) + kept * ramp, 1.0
    if model.rope_scaling != "yarn":
        return kept, 1.0

    def pair(turns: float) -> float:
        """The pair whose wavelength turns so often over the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair(YARN_FAST)), 0), min(math.ceil(pair(YARN_SLOW)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return kept * (1 - ramp) + kept / factor * ramp, yarn_attention(factor)


def raised_base(model: schema.Model, width: int) -> float:
    """RoPE's base for heads of `width`, with what "ntk" and "dynamic" multiply it by."""
    stretch = 1.0
    if model.rope_scaling == "ntk":
        stretch = model.rope_factor
    elif model.rope_scaling == "dynamic":
        stretch = model.rope_factor * model.context / model.rope_original_context - (model.rope_factor - 1)
    return model.rope_base * stretch ** (width / (width - 2)) if stretch != 1.0 else model.rope_base


def yarn_attention(factor: float) -> float:
    """What YaRN multiplies cosines and sines by, and so the scores by its square."""
    return 0.1 * math.log(factor) + 1.0


def rotary(positions_BT: Tensor, model: schema.Model, width: int, *, encoder: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, C / 2), float32, at integer positions of the decoder, or of the `encoder`."""
    if model.rope_scaling == "none":
        exponents = torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float32) / width
        angles = positions_BT[..., None].float() * model.rope_base**-exponents
        return angles.cos(), angles.sin()
    rates, factor = frequencies(model, width, encoder=encoder)
    angles = positions_BT[..., None].float() * rates.to(positions_BT.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis against each other (the half-split layout of Llama's Hugging Face files).

    `x` is (B, T, ..., C); `cos` and `sin` are (B, T, C / 2).
    """
    shape = (*cos.shape[:2], *(1,) * (x.dim() - 3), cos.size(-1))
    cos, sin = cos.view(shape), sin.view(shape)
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def relative_bucket(distance: Tensor, *, ordered: bool) -> Tensor:
    """T5's bucket (int64) of key position minus query position: exact for small distances, logarithmic up to 128.

    `ordered` counts only keys that come before; otherwise half the buckets are for keys after the query. (Raffel et
    al. 2020, arXiv 1910.10683; mesh_tensorflow's `_relative_position_bucket`, whose logarithm is float32.)
    """
    buckets = RELATIVE_BUCKETS
    offset = torch.zeros_like(distance)
    if ordered:
        distance = (-distance).clamp(min=0)
    else:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(RELATIVE_DISTANCE / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def relative_bias(table_HR: Tensor, start: int, stop: int, keys: int, *, ordered: bool) -> Tensor:
    """Bias (H, stop - start, keys) of queries at `start` to `stop` on keys from 0, from a stack's table (H, 32).

    By place in the row: distances inside a document are the same wherever packing puts it.
    """
    # A distance's bias once, and each query's window on them: written out by looking up pairs, 32,768 positions took
    # six times as long.
    distance = torch.arange(1 - stop, keys - start, device=table_HR.device)
    bias_H = table_HR[:, relative_bucket(distance, ordered=ordered)]
    return bias_H.unfold(1, keys, 1).flip(1)
