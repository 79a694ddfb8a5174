"""Trained models changed in shape: dense to sparse, fewer key heads, a longer context. Pure functions of their tensors.

Shapes, as suffixes: K key/value heads, G query heads a key head, X = G + 2, C head width, D width, F hidden, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from calledshot.recipe import UsageError, schema, shape
from calledshot.recipe.export import obstacles

Method = Literal["yarn", "ntk", "dynamic", "base"]

SPARSE = {"gate_up_2FD": "gate_up_E2FD", "up_FD": "up_EFD", "down_DF": "down_EDF"}
"""A feed-forward's matrices and the experts' that take their place."""
BLOCK = re.compile(r"((?:encoder\.)?blocks\.(\d+)\.)(.+)")


def upcycled_model(
    model: schema.Model, *, experts: int, top_k: int, dense_layers: int = 0, renormalize: bool = True
) -> schema.Model:
    """The sparse model whose experts are copies of a dense one's feed-forwards. UsageError where there is none."""
    found = shape(model)
    if model.experts:
        raise UsageError(f"the run has {model.experts} experts already; upcycle a dense one")
    if experts < 2:
        raise UsageError(f"--experts {experts}: must be 2 or more")
    if not 0 < top_k <= experts:
        raise UsageError(f"--top-k {top_k}: a token goes to 1 to {experts} of --experts {experts}")
    if top_k == 1 and renormalize:
        raise UsageError(
            "--top-k 1: weights that sum to 1 are then always 1, and teach the router nothing; take 2 or more, or "
            "--no-renormalize, with which the logits are no longer the dense model's"
        )
    if not 0 <= dense_layers < model.layers:
        raise UsageError(f"--dense-layers {dense_layers}: leaves none of the {model.layers} layers to the experts")
    if found.encoder and found.encoder_hidden != found.hidden:
        raise UsageError(
            f"model.encoder_hidden = {found.encoder_hidden} is not model.hidden = {found.hidden}: experts are of one "
            "width in both stacks, so these cannot become copies"
        )
    return _kept(
        model,
        experts=experts,
        top_k=top_k,
        expert_hidden=found.hidden,
        shared_expert_hidden=0,
        dense_layers=dense_layers,
        router="softmax",
        renormalize=renormalize,
    )


def upcycle(
    sparse: schema.Model, state: Mapping[str, Tensor], *, noise: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """The sparse model's state dict (`upcycled_model`) from the dense one's (Komatsuzaki et al. 2022, arXiv
    2212.05055).

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


def pooled_model(model: schema.Model, kv_heads: int) -> schema.Model:
    """The model with fewer key heads. UsageError where they cannot be grouped."""
    if not 0 < kv_heads < model.kv_heads or model.kv_heads % kv_heads:
        fewer = [str(number) for number in range(1, model.kv_heads) if model.kv_heads % number == 0]
        way_out = f"take {' or '.join(fewer)}" if fewer else "it has only one"
        raise UsageError(
            f"{kv_heads} key heads: the run has {model.kv_heads}, to be averaged in equal groups; {way_out}"
        )
    pooled = _kept(model, kv_heads=kv_heads)
    before, after = shape(model).encoder, shape(pooled).encoder
    if before and after and before.kv_heads % after.kv_heads:
        raise UsageError(
            f"{kv_heads} key heads: would leave the encoder {after.kv_heads} of its {before.kv_heads}, which are no "
            "equal groups"
        )
    return pooled


def pool_kv_heads(pooled: schema.Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with `pooled.kv_heads` key heads (`pooled_model`), each the mean of a group of neighbours (Ainslie
    et al. 2023, arXiv 2305.13245: better than taking one of them); all attention of decoder and encoder alike.

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


def extended_model(
    model: schema.Model, context: int, method: Method | None = None, factor: float | None = None
) -> schema.Model:
    """The model reading `context` tokens; its weights stay as they are. UsageError where that says nothing new.

    With RoPE, positions past those trained on are brought among them by `method`: `yarn` (the default), `ntk` or
    `dynamic` as `positions.frequencies` has them, with a `factor` of context / original context; or `base`, which
    multiplies RoPE's base by `factor`, to be trained on (Xiong et al. 2023, arXiv 2309.16039: 50 for 8 times the
    length). T5's bias and no positions at all need none. An encoder's context grows by the same factor.
    """
    if context <= model.context:
        raise UsageError(f"--context {context}: the run reads {model.context} tokens already; extend it to more")
    changes: dict[str, int | float | str] = {"context": context}
    if model.encoder_context:
        changes["encoder_context"] = round(model.encoder_context * context / model.context)
    if model.positions != "rope":
        if method or factor:
            raise UsageError(f"model.positions = {model.positions!r} is not RoPE: leave out --method and --factor")
        return _kept(model, **changes)
    chosen = method or (model.rope_scaling if model.rope_scaling != "none" else "yarn")
    if model.rope_scaling not in ("none", chosen):
        raise UsageError(
            f"--method {chosen}: the run is extended by {model.rope_scaling} already; go on with that, or extend the "
            "run that it came from"
        )
    if factor is not None and not 1.0 <= factor < float("inf"):
        raise UsageError(f"--factor {factor:g}: must be 1 or more")
    if chosen == "base":
        if factor is None:
            raise UsageError("--method base: say with --factor what RoPE's base is multiplied by, such as 50")
        return _kept(model, **changes, rope_base=model.rope_base * factor)
    original = model.rope_original_context or model.context
    changes |= {"rope_scaling": chosen, "rope_original_context": original, "rope_factor": factor or context / original}
    return _kept(model, **changes)


def _kept(model: schema.Model, **changes: object) -> schema.Model:
    """The model with some keys changed, and without a demand on its export that it then fails."""
    changed = replace(model, **changes)
    lost = changed.exportable_to and obstacles(changed, changed.exportable_to)
    return replace(changed, exportable_to="") if lost else changed
