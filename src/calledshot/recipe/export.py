"""Which Hugging Face class computes what a model does, and what would have to change where none does."""

import operator
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .derived import shape
from .errors import UsageError
from .reading import build, override, plain, split_overrides
from .schema import Model, Recipe

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
MOST_CHANGES = 8
"""Keys that the nearest recipe may change; one that is further away is another recipe."""
TAKEN = re.compile(r"(\S+) = (\d+) .*: take (?:one of )?(\d[\d, or]*)")
"""Key, value and the values offered instead, in a problem that offers some."""
NAMED = re.compile(r"(?:model|objective|batch|parallel)\.[a-z_]+")
"""Keys in a problem that may be changed; data and duration are the user's own matter."""
PROPOSED = re.compile(NAMED.pattern + r"=[\w-]+")
"""Overrides in a problem."""


@dataclass(frozen=True)
class Obstacle:
    """Something about a model that a class cannot hold."""

    found: str
    """The key and its value."""
    reason: str
    """What the class is instead."""
    change: str
    """The override that would remove it."""


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


def export_kind(model: Model, recipe: Recipe | None = None) -> str:
    """The key in CLASSES of the class that computes the same function.

    UsageError where there is none, with the reasons and with the overrides that give the nearest recipe that has one;
    they have to go with the other sections of `recipe`, without one with the defaults.
    """
    if model.topology == "encoder-decoder":
        kinds = ["t5"]
    else:
        kinds = ["qwen3-moe", "mixtral"] if model.experts else ["qwen3", "llama"]
        if not model.qk_norm:
            kinds.reverse()
    kinds.sort(key=lambda kind: len(obstacles(model, kind)))
    if not obstacles(model, kinds[0]):
        return kinds[0]
    ways = {kind: fewest_changes(replace(recipe or Recipe(), model=model), kind) for kind in kinds}
    near = min(kinds, key=lambda kind: MOST_CHANGES + 1 if (way := ways[kind]) is None else len(way))
    raise UsageError(f"no Hugging Face class computes this model: {_told(model, near, ways[near])}")


def export_problems(recipe: Recipe) -> Iterator[str]:
    """What keeps the model from the class that `exportable_to` asks for."""
    if (kind := recipe.model.exportable_to) and obstacles(recipe.model, kind):
        yield f"model.exportable_to = {kind}: {_told(recipe.model, kind, fewest_changes(recipe, kind))}"


def fewest_changes(recipe: Recipe, kind: str) -> tuple[str, ...] | None:
    """The fewest overrides that make the class hold the recipe's model and give the checker nothing new to refuse; None
    where it takes more than MOST_CHANGES.

    Breadth first: one change may ask for others (a key that loses its meaning has to go too, a batch has to come out
    even), so after each the first thing that is wrong is met by every way out that its own line names.
    """
    from .check import problems  # which asks this file in turn

    start = replace(recipe, model=replace(recipe.model, exportable_to=""))
    refused_before = set(problems(start))
    tried: set[frozenset[str]] = set()
    queue: deque[tuple[str, ...]] = deque([()])
    while queue:
        changes = queue.popleft()
        changed = _with(start, changes)
        if found := obstacles(changed.model, kind):
            ways = [found[0].change]
        elif new := next((problem for problem in problems(changed) if problem not in refused_before), None):
            ways = _ways_out(new)
        else:
            return changes
        keys = {change.partition("=")[0] for change in changes}
        for way in ways:
            more = frozenset({*changes, way})
            if len(more) <= MOST_CHANGES and more not in tried and way.partition("=")[0] not in keys:
                tried.add(more)
                queue.append((*changes, way))
    return None


def _with(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """As the command line would lay them on it."""
    data = plain(recipe)
    for key, text in split_overrides(overrides):
        override(data, key, text)
    return build(Recipe, data)


def _ways_out(problem: str) -> Iterator[str]:
    """What may solve a problem, likeliest first: the overrides that its line asks for, each key's default."""
    if taken := TAKEN.match(problem):
        key, value, numbers = taken.groups()
        offered = [int(number) for number in re.findall(r"\d+", numbers)]
        yield f"{key}={min(reversed(offered), key=lambda number: abs(number - int(value)))}"
    yield from PROPOSED.findall(problem)
    for key in NAMED.findall(problem):
        yield f"{key}={_written(operator.attrgetter(key)(Recipe()))}"


def _told(model: Model, kind: str, changes: tuple[str, ...] | None) -> str:
    reasons = "; ".join(f"{one.found}, but {one.reason}" for one in obstacles(model, kind))
    if changes is None:
        return f"{reasons}. No change of {MOST_CHANGES} keys or fewer makes it a {CLASSES[kind]}"
    return f"{reasons}. {CLASSES[kind]} fits with {' '.join(changes)}"


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
    reason = f"its heads divide the width ({model.width})"
    return [Obstacle(f"model.heads = {model.heads}", reason, f"model.heads={(grouped or divisors)[-1]}")]


def _written(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
