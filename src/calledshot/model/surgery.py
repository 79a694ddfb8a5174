"""Trained models changed in shape: dense to sparse, fewer key heads, a longer context. Pure functions of their tensors.

Shapes, as suffixes: K key/value heads, G query heads a key head, X = G + 2, C head width, D width, F hidden, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from calledshot.recipe import schema, shape

SPARSE = {"gate_up_2FD": "gate_up_E2FD", "up_FD": "up_EFD", "down_DF": "down_EDF"}
"""A feed-forward's matrices and the experts' that take their place."""
BLOCK = re.compile(r"((?:encoder\.)?blocks\.(\d+)\.)(.+)")


def upcycle(
    sparse: schema.Model, state: Mapping[str, Tensor], *, noise: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """The sparse model's state dict (`recipe.conversion.upcycled_model`) from the dense one's (Komatsuzaki et al. 2022,
    arXiv 2212.05055).

    Every expert is a copy of the feed-forward and routers are normal, 1 / sqrt(D), so that the logits are the dense
    model's while a token's weights sum to 1; without `renormalize` they are far off. `noise` adds to each copy a normal
    of so many times its matrix's root mean square, which tells the experts apart from the first step on.
    """
    generator = torch.Generator().manual_seed(seed)
    upcycled = _repeated(sparse, state)
    for name, tensor in upcycled.items():
        if noise and ".experts." in name:
            scale = noise * tensor[0].square().mean().sqrt()
            tensor += scale * torch.randn(tensor.shape, generator=generator)
    for name in list(state):
        if (place := _sparse_place(sparse, name)) and name.endswith("down_DF"):
            width = state[name].size(0)
            router_ED = torch.randn(sparse.experts, width, generator=generator) * width**-0.5
            upcycled[f"{place[0]}experts.router_ED"] = router_ED
            if sparse.balance == "bias":
                upcycled[f"{place[0]}experts.bias_E"] = torch.zeros(sparse.experts)
    return upcycled


def upcycle_optimizer(sparse: schema.Model, optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's state by `PARAMETER.KEY`, that of a feed-forward repeated for each of its copies; routers have
    none. In the paper this helped vision, and did not help language.
    """
    return _repeated(sparse, optimizer)


def _repeated(sparse: schema.Model, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    repeated = {}
    for name, tensor in tensors.items():
        place = _sparse_place(sparse, name)
        if place is None:
            repeated[name] = tensor
        else:
            # A count of steps, say, is one for all.
            copies = tensor if tensor.dim() < 2 else tensor.expand(sparse.experts, *tensor.shape).clone()
            repeated[f"{place[0]}experts.{place[1]}"] = copies
    return repeated


def _sparse_place(sparse: schema.Model, name: str) -> tuple[str, str] | None:
    """The block's prefix and the experts' name of a tensor that becomes theirs; None for every other."""
    found = BLOCK.fullmatch(name)
    if found is None or int(found[2]) < sparse.dense_layers:
        return None
    matrix, _, rest = found[3].partition(".")
    return (found[1], f"{SPARSE[matrix]}{'.' if rest else ''}{rest}") if matrix in SPARSE else None


def pool_kv_heads(pooled: schema.Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with `pooled.kv_heads` key heads (`recipe.conversion.pooled_model`), each the mean of a group of
    neighbours (Ainslie et al. 2023, arXiv 2305.13245: better than taking one of them); all attention of decoder and
    encoder alike.

    Query heads stay in their order, and the logits are the same to the bit where the heads of a group are equal.
    """
    found = shape(pooled)
    result = dict(state)
    for name, tensor in state.items():
        stack = found.encoder if name.startswith("encoder.") else found.decoder
        kind, K = name.rpartition(".")[2], 0 if stack is None else stack.kv_heads
        if kind == "qkv_KXCD":
            query, key_value = tensor[:, :-2], tensor[:, -2:]
            result[name] = torch.cat((_regrouped(query, K), _mean(key_value, K)), dim=1)
        elif kind == "cross_query_KGCD":
            result[name] = _regrouped(tensor, K)
        elif kind == "cross_key_value_K2CD":
            result[name] = _mean(tensor, K)
    return result


def _regrouped(query_KGCD: Tensor, kv_heads: int) -> Tensor:
    return query_KGCD.reshape(kv_heads, -1, *query_KGCD.shape[2:])


def _mean(key_value_K2CD: Tensor, kv_heads: int) -> Tensor:
    # In float64, where three equal numbers have that number as their mean.
    return key_value_K2CD.unflatten(0, (kv_heads, -1)).double().mean(1).to(key_value_K2CD.dtype)
