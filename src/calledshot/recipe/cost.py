"""What a recipe costs, by arithmetic alone: parameters, FLOPs, bytes, tokens, hours, money. The project's one counter.

Legend: D width, H query heads, K key and value heads, C head width, F hidden, V vocabulary, T context.
A matmul of (m, k) by (k, n) counts 2 m k n FLOPs. Norms, RoPE, softmax and the optimizer count nothing, as is usual.
"""

from dataclasses import dataclass, replace

from .activations import Setting, fullest, passing
from .batching import batching
from .derived import GATED, RELATIVE_BUCKETS, Shape, Stack, pooled, shape
from .errors import UsageError
from .layout import Layout
from .schema import Recipe

DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Matmul:
    """A kind of matrix that activations are multiplied by."""

    name: str
    inputs: int
    outputs: int
    stored: int
    """Copies that the model holds: one a layer, E where there are experts; 0 for a tied head, which is stored as the
    embedding."""
    used: int
    """Copies that a token which comes this way is multiplied by."""
    share: float = 1.0
    """Such tokens as a share of all of a sequence, the encoder's and the decoder's; a mean over the layers."""
    head: bool = False
    """Part of the head, hence not of `non_embedding`."""

    @property
    def size(self) -> int:
        """Entries of one copy."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `non_embedding` leaves out the embedding AND the head. `active` are those that take part in
    one sequence's forward pass if each token goes to the same experts: all of them, where there are none."""

    total: int
    non_embedding: int
    active: int
    embedding: int
    head: int
    """0 where the head is tied, since `embedding` holds the matrix."""
    matrices: int
    """Entries of the blocks' matrices: what Muon updates."""
    vectors: int
    """Entries of all gains."""


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, averaged over a sequence of the full context. Shorter documents need less for attention."""

    forward: int
    backward: int
    """Twice the forward: gradients of the activations and of the parameters."""
    attention: int
    """Scores and their use, forward and backward, of the keys that a query sees on average: (T + 1) / 2 where all is
    causal, 5/8 T where half the sequence is a prefix, all that an encoder or the attention across to it has."""
    attention_full: int
    """The same if every query saw all T keys, as counters do that ignore the mask (PaLM's formula, FlopCounterMode)."""
    total: int
    """Forward and backward, attention included."""


@dataclass(frozen=True)
class Bytes:
    """Bytes on one device that holds the whole model; `recipe.memory` says what stands at the same time."""

    weights: int
    """Copy of the parameters in the type of the matmuls; 0 in float32, where the master weights are used."""
    master: int
    """float32 parameters."""
    gradients: int
    """float32 sum over the micro-batches, and those of the present one in the type of the matmuls."""
    optimizer: int
    """float32: Muon one moment for each matrix, AdamW two for everything else."""
    activations: int
    """That one micro-batch holds at its fullest on a GPU: see `activation_bytes`."""
    kv_cache_per_token: int
    """Keys and values of all layers of the decoder, without those of what an encoder gave."""
    checkpoint: int
    """Master weights and optimizer."""

    @property
    def fixed(self) -> int:
        """What training holds whatever the micro-batch."""
        return self.weights + self.master + self.gradients + self.optimizer


@dataclass(frozen=True)
class Cost:
    """What a recipe costs. What cannot be known before a measurement is None."""

    shape: Shape
    parameters: Parameters
    flops_per_token: Flops
    bytes: Bytes
    micro_tokens: int
    """Tokens of the micro-batch that `bytes.activations` is for."""
    batch_tokens: int
    steps: int | None
    """None where the duration is in minutes and no speed was given."""
    tokens: int | None
    """`steps` times `batch_tokens`."""
    flops: float | None
    """Of the whole run."""
    minutes: float | None
    """The duration, where it is in minutes."""

    def hours(self, mfu: float, peak: float, gpus: int = 1) -> float | None:
        """Wall-clock of the training loop at a share `mfu` of `peak` FLOP/s on each of `gpus`; None where the FLOPs are
        unknown. A duration in minutes is its own answer."""
        if self.minutes is not None:
            return self.minutes / 60
        return None if self.flops is None else self.flops / (mfu * peak * gpus * 3600)

    def money(self, price: float, mfu: float, peak: float, gpus: int = 1) -> float | None:
        """The run at `price` for a GPU hour."""
        hours = self.hours(mfu, peak, gpus)
        return None if hours is None else hours * gpus * price


def matmuls(model: Shape) -> list[Matmul]:
    """Every matrix that a token is multiplied by; the embedding's lookup is none."""
    found = []
    row = model.row_positions
    across = pooled(model)
    for stack in model.stacks:
        D, H, K, C, n = stack.width, stack.heads, stack.kv_heads, model.head_width, stack.layers
        share = model.context / row if stack.ordered else sum(across) / (n * row)
        prefix = "" if stack.ordered else "encoder."
        found += [
            Matmul(f"{prefix}attention.w_qkv", D, (H + 2 * K) * C, n, n, share),
            Matmul(f"{prefix}attention.w_out", H * C, D, n, n, share),
        ]
        if stack.cross_width:
            found += [
                Matmul("cross.w_query", D, H * C, n, n, share),
                Matmul("cross.w_key_value", stack.cross_width, 2 * K * C, n, n, across[-1] / row),
                Matmul("cross.w_out", H * C, D, n, n, share),
            ]
        found += _feed_forward(model, stack, share, prefix)
    head = Matmul(
        "head", model.width, model.vocabulary, 0 if model.tied_embeddings else 1, 1, model.context / row, head=True
    )
    return [*found, head]


def _feed_forward(model: Shape, stack: Stack, share: float, prefix: str) -> list[Matmul]:
    D, n = stack.width, stack.layers
    first = 2 if model.feed_forward in GATED else 1
    name = f"{prefix}feed_forward.w_{'gate_up' if first == 2 else 'up'}"

    def both(hidden: int, kind: str, stored: int, used: int) -> list[Matmul]:
        down = f"{prefix}feed_forward.{kind}w_down"
        up = name.replace(".w_", f".{kind}w_")
        return [Matmul(up, D, first * hidden, stored, used, share), Matmul(down, hidden, D, stored, used, share)]

    sparse = max(0, n - model.dense_layers) if model.experts else 0
    found = both(stack.hidden, "", n - sparse, n - sparse) if sparse < n else []
    if sparse:
        found += [Matmul(f"{prefix}feed_forward.router", D, model.experts, sparse, sparse, share)]
        found += both(model.expert_hidden, "expert.", sparse * model.experts, sparse * model.top_k)
        if model.shared_expert_hidden:
            found += both(model.shared_expert_hidden, "shared.", sparse, sparse)
    return found


def gains(model: Shape) -> int:
    """Entries of all norms' gains and of the tables of positions."""
    total = 0
    for stack in model.stacks:
        branches = 3 if stack.cross_width else 2
        norms = branches * (2 if model.norm_placement == "sandwich" else 1)
        heads = 2 * (branches - 1) * model.head_width if model.qk_norm else 0
        total += stack.layers * (norms * stack.width + heads)
        total += 0 if model.norm_placement == "post" else stack.width
        total += RELATIVE_BUCKETS * stack.heads if model.positions == "t5" else 0
    return total


def parameters(model: Shape) -> Parameters:
    """Counts of the model's parameters."""
    vectors = gains(model)
    embedding = model.vocabulary * model.width
    if model.encoder_width not in (0, model.width):
        embedding += model.vocabulary * model.encoder_width
    matrices = sum(one.stored * one.size for one in matmuls(model) if not one.head)
    head = sum(one.stored * one.size for one in matmuls(model) if one.head)
    idle = sum(max(0, one.stored - one.used) * one.size for one in matmuls(model))
    total = embedding + matrices + head + vectors
    return Parameters(
        total=total,
        non_embedding=matrices + vectors,
        active=total - idle,
        embedding=embedding,
        head=head,
        matrices=matrices,
        vectors=vectors,
    )


def _attention(model: Shape) -> tuple[float, float]:
    """FLOPs of scores and their use in one sequence's forward pass: as the masks have it, and if all saw all."""
    T = model.context
    per_pair = 4 * model.head_width
    pairs = T * T * 5 / 8 if model.topology == "prefix" else T * (T + 1) / 2
    decoder = per_pair * model.heads * model.layers
    seen, full = decoder * pairs, decoder * T * T
    if model.encoder is not None:
        lengths = pooled(model)
        both = per_pair * model.encoder.heads * sum(length**2 for length in lengths) + decoder * T * lengths[-1]
        seen, full = seen + both, full + both
    return seen, full


def flops_per_token(model: Shape) -> Flops:
    """FLOPs of one token, forward and backward; of an encoder-decoder, a mean over the tokens of both."""
    matrices = sum(2 * one.used * one.size * one.share for one in matmuls(model))
    seen, full = (one / model.row_positions for one in _attention(model))
    forward = round(matrices + seen)
    return Flops(
        forward=forward,
        backward=2 * forward,
        attention=round(3 * seen),
        attention_full=round(3 * full),
        total=3 * forward,
    )


def activation_bytes(
    model: Shape, micro_tokens: int, dtype_bytes: int = 2, compiled: bool = True, device: str = "cuda"
) -> int:
    """What one micro-batch holds at its fullest on one rank: kept for the backward and taken by the work for a while,
    without parameters and their gradients.
    """
    how = Setting(device, dtype_bytes, compiled)
    parts = passing(model, micro_tokens / model.row_positions, Layout(), how)
    return int(fullest([replace(part, gradients=0.0) for part in parts]))


def optimizer_bytes(counts: Parameters, optimizer: str) -> int:
    """float32 state; an optimizer of the user's own counts as AdamW."""
    moments = 1 if optimizer == "muon" else 2
    return 4 * (moments * counts.matrices + 2 * (counts.total - counts.matrices))


def steps(recipe: Recipe, flops: int, tokens_per_second: float | None = None) -> int | None:
    """Updates of the run: enough for the tokens asked for, as many as the FLOPs or minutes allow, at least one."""
    duration, batch = recipe.duration, recipe.batch.tokens
    if duration.tokens:
        return batching(recipe).needed(duration.tokens)
    if duration.flops:
        return max(1, int(duration.flops // (flops * batch)))
    if tokens_per_second is None:
        return None
    return max(1, int(duration.minutes * 60 * tokens_per_second // batch))


def checked_shape(recipe: Recipe) -> Shape:
    """The model's full shape. Raises: `UsageError` where it leaves the vocabulary to a tokenizer."""
    if not recipe.model.vocabulary:
        raise UsageError(
            "model.vocabulary = 0 leaves the size to the tokenizer, so the cost is unknown: add model.vocabulary=SIZE"
        )
    return shape(recipe.model)


def cost(recipe: Recipe, tokens_per_second: float | None = None) -> Cost:
    """What the recipe costs. `tokens_per_second`, of the whole run, gives a duration in minutes its tokens.

    Raises: `UsageError` where the vocabulary is left to a tokenizer, which only `shot data build` reads.
    """
    model = checked_shape(recipe)
    counts, flops = parameters(model), flops_per_token(model)
    dtype_bytes = DTYPE_BYTES[recipe.parallel.dtype]
    optimizer = optimizer_bytes(counts, recipe.optimizer.name)
    micro_tokens = recipe.parallel.micro_tokens or model.row_positions
    number = steps(recipe, flops.total, tokens_per_second)
    tokens = None if number is None else batching(recipe).tokens(number)
    return Cost(
        shape=model,
        parameters=counts,
        flops_per_token=flops,
        bytes=Bytes(
            weights=0 if dtype_bytes == 4 else counts.total * dtype_bytes,
            master=4 * counts.total,
            gradients=(4 + dtype_bytes) * counts.total,
            optimizer=optimizer,
            activations=activation_bytes(model, micro_tokens, dtype_bytes, recipe.parallel.compile != "off"),
            kv_cache_per_token=2 * model.layers * model.kv_heads * model.head_width * dtype_bytes,
            checkpoint=4 * counts.total + optimizer,
        ),
        micro_tokens=micro_tokens,
        batch_tokens=recipe.batch.tokens,
        steps=number,
        tokens=tokens,
        flops=None if tokens is None else float(tokens * flops.total),
        minutes=recipe.duration.minutes or None,
    )
