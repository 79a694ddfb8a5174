"""Which Hugging Face class computes what a model does, and what would have to change where none does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .derived import shape
from .errors import UsageError
from .schema import Model

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "t5": "T5ForConditionalGeneration",
}
"""Class of `transformers` by the name that `model.exportable_to` has for it."""

T5_FEED_FORWARDS = {"geglu": "gated-gelu", "swiglu": "gated-silu", "gelu": "gelu_new", "relu2": "relu2"}
"""What T5's `feed_forward_proj` calls ours."""


@dataclass(frozen=True)
class Obstacle:
    """Something about a model that a class cannot hold."""

    found: str
    """The key and its value."""
    reason: str
    """What the class is instead."""
    change: str
    """The overrides that would remove it."""


def obstacles(model: Model, kind: str) -> list[Obstacle]:
    """What keeps a model from being the class that `kind`, a key of CLASSES, names; none where the logits are equal.

    Prefixes are none: the class computes the same once it is given their mask. Nor is `rope_scaling`: `yarn` and
    `llama3` are the class's own, and the others are a higher base.
    """
    found = shape(model)
    return [
        Obstacle(f"model.{key} = {_written(getattr(found, key))}", reason, f"model.{key}={_written(allowed[0])}")
        for key, allowed, reason in _demands(model, kind)
        if getattr(found, key) not in allowed
    ] + (_heads(model) if kind == "llama" else [])


def export_kind(model: Model) -> str:
    """The key in CLASSES of the class that computes the same function.

    UsageError where there is none, with the reasons and with the overrides that give the nearest model that has one.
    """
    if model.topology == "encoder-decoder":
        kinds = ["t5"]
    else:
        kinds = ["qwen3-moe", "mixtral"] if model.experts else ["qwen3", "llama"]
        if not model.qk_norm:
            kinds.reverse()
    nearest = min(kinds, key=lambda kind: len(obstacles(model, kind)))
    if found := obstacles(model, nearest):
        raise UsageError(f"no Hugging Face class computes this model: {_told(nearest, found)}")
    return nearest


def export_problems(model: Model) -> Iterator[str]:
    """What keeps the model from the class that `exportable_to` asks for."""
    if model.exportable_to and (found := obstacles(model, model.exportable_to)):
        yield f"model.exportable_to = {_written(model.exportable_to)}: {_told(model.exportable_to, found)}"


def _told(kind: str, found: list[Obstacle]) -> str:
    reasons = "; ".join(f"{one.found}, but {one.reason}" for one in found)
    return f"{reasons}. {CLASSES[kind]} fits with {' '.join(one.change for one in found)}"


def _demands(model: Model, kind: str) -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Key, the values that the class can hold (the first is the one to change to), and what the class is like."""
    decodes = kind != "t5"
    yield (
        "topology",
        ("decoder", "prefix") if decodes else ("encoder-decoder",),
        "it has no encoder" if decodes else "it has an encoder",
    )
    yield (
        "positions",
        ("rope",) if decodes else ("t5",),
        f"its positions are {'RoPE' if decodes else 'a relative bias'}",
    )
    yield "norm", ("rmsnorm",), "its norms are RMSNorm"
    yield "norm_placement", ("pre",), "it normalizes before each branch alone"
    yield (
        "feed_forward",
        ("swiglu",) if decodes else tuple(T5_FEED_FORWARDS),
        "its feed-forward is SwiGLU" if decodes else f"it knows {', '.join(T5_FEED_FORWARDS)}",
    )
    normalized = kind in ("qwen3", "qwen3-moe")
    yield "qk_norm", (normalized,), f"it {'normalizes' if normalized else 'does not normalize'} queries and keys"
    yield "softcap", (0.0,), "it does not cap logits"
    if kind in ("qwen3-moe", "mixtral"):
        yield "experts", (model.experts or 8,), "it has experts"
        yield "router", ("softmax",), "its router is a softmax over all experts"
        yield "balance", ("auxiliary", "none"), "nothing is added to the scores that choose its experts"
        yield "shared_expert_hidden", (0,), "no expert of it is shared by all tokens"
    else:
        yield "experts", (0,), "its feed-forward is dense"
    if kind == "mixtral":
        yield "renormalize", (True,), "the weights of a token's experts sum to 1"
        yield "dense_layers", (0,), "all its layers have experts"
    if kind == "t5":
        found = shape(model)
        inside = (found.hidden, *(() if model.encoder_hidden else (found.encoder_hidden,)))  # which follows the width
        yield "kv_heads", (model.heads,), "each query head has a key head of its own"
        yield "encoder_pooling", (1,), "its encoder keeps every token"
        yield "encoder_width", (model.width, 0), "its stacks are of one width"
        yield "encoder_hidden", inside, "its stacks are of one width inside"


def _heads(model: Model) -> list[Obstacle]:
    """Llama's configuration wants heads that divide the width, whatever a head's own width is."""
    if model.width % model.heads == 0:
        return []
    divisors = [number for number in range(1, model.heads) if model.width % number == 0]
    grouped = [number for number in divisors if number % model.kv_heads == 0]
    change = f"model.heads={grouped[-1]}" if grouped else f"model.heads={divisors[-1]} model.kv_heads={divisors[-1]}"
    reason = f"its heads divide the width ({model.width})"
    return [Obstacle(f"model.heads = {model.heads}", reason, change)]


def _written(value: Any) -> str:
    """As on the command line."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
