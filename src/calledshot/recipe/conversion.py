"""What `shot convert` makes of a model, by arithmetic: its recipe. `model.surgery` does it to the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from . import schema
from .derived import shape
from .errors import UsageError
from .export import obstacles
from .keys import nearest

Method = Literal["yarn", "ntk", "dynamic", "base"]
FLAGS = ("renormalize", "keep_optimizer")
OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "upcycle": {"experts": int, "top_k": int, "dense_layers": int, "noise": float},
    "kv-heads": {},
    "extend": {"context": int, "method": str, "factor": float},
}
"""What follows each verb of `shot convert`, besides `FLAGS` of the first and the number of the second."""


def converted(model: schema.Model, command: Sequence[str]) -> schema.Model:
    """The model that `shot convert COMMAND` makes, RUN and `--name` left out of it: `["upcycle", "--experts", "8"]`.
    UsageError where it would refuse, or where there is no such command."""
    verb, *words = command
    if verb not in OPTIONS:
        raise UsageError(f"shot convert {verb}: there are {', '.join(OPTIONS)}")
    options, loose = _options(verb, words)
    if verb == "kv-heads":
        if len(loose) != 1 or not loose[0].isdecimal():
            raise UsageError(f"shot convert kv-heads {' '.join(loose)}: say how many heads are left, as in kv-heads 2")
        return pooled_model(model, int(loose[0]))
    if loose:
        raise UsageError(f"shot convert {verb}: {loose[0]!r} is no option of it")
    needed = "experts" if verb == "upcycle" else "context"
    if needed not in options:
        raise UsageError(f"shot convert {verb}: needs --{needed}")
    if verb == "extend":
        return extended(model, **options)
    for name in ("noise", "keep_optimizer"):
        options.pop(name, None)
    return upcycled_model(model, **({"top_k": 2} | options))


def _options(verb: str, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Options by name, and what belongs to none."""
    kinds, flags = OPTIONS[verb], FLAGS if verb == "upcycle" else ()
    found: dict[str, Any] = {}
    loose: list[str] = []
    left = iter(words)
    for word in left:
        if not word.startswith("--"):
            loose.append(word)
            continue
        option, equals, value = word[2:].partition("=")
        name = option.replace("-", "_")
        if name.removeprefix("no_") in flags and not equals:
            found[name.removeprefix("no_")] = not name.startswith("no_")
        elif name in kinds:
            text = value if equals else next(left, "")
            try:
                found[name] = kinds[name](text)
            except ValueError as error:
                raise UsageError(f"shot convert {verb}: --{option} {text!r} is no number") from error
        else:
            near = nearest(name, (*kinds, *flags))
            hint = f"; did you mean --{near.replace('_', '-')}?" if near else ""
            raise UsageError(f"shot convert {verb}: has no option --{option}{hint}")
    return found, loose


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


def extended(
    model: schema.Model, context: int, method: Method | None = None, factor: float | None = None
) -> schema.Model:
    """`extended_model`, where without `factor` `base` takes as many times as the context grows, and an imported
    `dynamic` its own."""
    if factor is None and method == "base" and model.positions == "rope":
        factor = max(context / model.context, 1.0)
    elif factor is None and model.rope_scaling == "dynamic" and model.context == model.rope_original_context:
        factor = model.rope_factor  # as its configuration has it
    return extended_model(model, context, method, factor)


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
