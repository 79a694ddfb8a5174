"""How the ranks of a job can share its work: which of them hold the same weights, and which see the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .derived import shape
from .errors import UsageError
from .schema import Recipe


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups that the ranks form; a rank's place in them varies slowest in `replicate` and fastest in
    `tensor`."""

    replicate: int = 1
    """Copies of the weights."""
    shard: int = 1
    """Ranks that share one copy's weights, gradients and optimizer state, and see other rows of the batch."""
    context: int = 1
    """Ranks that see other positions of the same rows."""
    tensor: int = 1
    """Ranks that compute other parts of every matrix for the same positions."""
    expert: int = 1
    """Ranks that hold other experts; they are taken from the first three."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data(self) -> int:
        """Groups of ranks that each take their own rows of the batch."""
        return self.replicate * self.shard


def parallel_problems(recipe: Recipe) -> Iterator[str]:
    """Ways to share the model that it cannot be cut into, for any number of ranks."""
    parallel, model = recipe.parallel, shape(recipe.model)
    cut: dict[str, int] = {}
    for stack, prefix in ((model.decoder, ""), (model.encoder, "encoder's ")):
        if stack is not None:
            cut |= {f"{prefix}kv_heads": stack.kv_heads, f"{prefix}heads": stack.heads}
            if not model.experts or model.dense_layers:
                cut[f"{prefix}hidden"] = stack.hidden
    if model.experts:
        cut["expert_hidden"] = model.expert_hidden
        if model.shared_expert_hidden:
            cut["shared_expert_hidden"] = model.shared_expert_hidden
    for name, size in cut.items():
        if size % parallel.tensor:
            fitting = divisors(math.gcd(*cut.values()))
            yield f"parallel.tensor = {parallel.tensor} does not divide the model's {name} = {size}: take {fitting}"
            break
    if parallel.expert > 1 and parallel.tensor > 1:
        yield (
            f"parallel.expert = {parallel.expert} and parallel.tensor = {parallel.tensor} would both cut the experts: "
            "set one of them to 1"
        )
    elif parallel.expert > 1 and not model.experts:
        yield f"parallel.expert = {parallel.expert} shares experts, and there are none: set model.experts"
    elif model.experts % parallel.expert:
        fitting = divisors(model.experts)
        yield f"parallel.expert = {parallel.expert} does not divide model.experts = {model.experts}: take {fitting}"
    if parallel.context > 1 and model.encoder is not None:
        yield (
            f"parallel.context = {parallel.context} shares the positions of a decoder alone: set parallel.context=1, "
            "and share by parallel.tensor or parallel.shard instead"
        )
    elif model.context % parallel.context:
        near = max(n for n in range(1, parallel.context) if model.context % n == 0)
        yield f"parallel.context = {parallel.context} does not divide model.context = {model.context}: take {near}"
    if parallel.float8 and parallel.dtype == "float32":
        yield 'parallel.float8 is for matmuls in bfloat16, and parallel.dtype is "float32": leave one of them out'


def layouts(recipe: Recipe, ranks: int) -> list[Layout]:
    """The layouts of `ranks` ranks that the recipe's `parallel` leaves open, a copy of the weights on fewest ranks
    first.

    Raises: `UsageError` where the ranks do not come out even, or the model cannot be cut so.
    """
    parallel = recipe.parallel
    for problem in parallel_problems(recipe):
        raise UsageError(problem)
    tensor, context, expert = parallel.tensor, parallel.context, parallel.expert
    rest, odd = divmod(ranks, tensor * context)
    if odd or not rest:
        raise UsageError(
            f"{ranks} ranks are not a multiple of parallel.tensor = {tensor} times parallel.context = {context}: "
            f"start {max(1, rest) * tensor * context}, or lower one of them"
        )
    for key in ("replicate", "shard"):
        if (asked := getattr(parallel, key)) and rest % asked:
            raise UsageError(
                f"parallel.{key} = {asked} does not divide {_left(ranks, tensor, context)}: take {divisors(rest)}"
            )
    if parallel.replicate and parallel.shard and parallel.replicate * parallel.shard != rest:
        raise UsageError(
            f"parallel.replicate = {parallel.replicate} times parallel.shard = {parallel.shard} is not "
            f"{_left(ranks, tensor, context)}: set parallel.replicate=0, which takes what the others leave"
        )
    if rest * context % expert:
        raise UsageError(
            f"parallel.expert = {expert} does not divide the {rest * context} ranks that parallel.tensor = {tensor} "
            f"leaves: take {divisors(math.gcd(rest * context, recipe.model.experts))}"
        )
    sizes = {f"batch.ramp.{place}.tokens": stage.tokens for place, stage in enumerate(recipe.batch.ramp)}
    key, tokens = min({"batch.tokens": recipe.batch.tokens, **sizes}.items(), key=lambda size: size[1])
    rows = tokens // shape(recipe.model).row_positions
    if rows < rest:
        raise UsageError(
            f"{key} = {tokens} is {rows} sequences, too few for {rest} ranks that each take their "
            f"own: raise it, or start {rows * tensor * context} ranks"
        )
    shard = parallel.shard or (rest // parallel.replicate if parallel.replicate else 0)
    shards = [shard] if shard else [n for n in range(1, rest + 1) if rest % n == 0]
    return [Layout(rest // n, n, context, tensor, expert) for n in shards]


def _left(ranks: int, tensor: int, context: int) -> str:
    if tensor * context == 1:
        return f"the {ranks} ranks"
    return f"the {ranks // (tensor * context)} ranks that tensor and context leave of {ranks}"


def divisors(number: int) -> str:
    """All divisors of a number, for people; the largest few of one that has many."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found[:-1])) + f" or {found[-1]}" if len(found) > 1 else "1"
