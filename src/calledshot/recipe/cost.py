"""What a recipe costs, by arithmetic alone: parameters, FLOPs, bytes, tokens, hours, money. The project's one counter.

Legend: D width, H query heads, K key and value heads, C head width, F hidden, V vocabulary, T context.
A matmul of (m, k) by (k, n) counts 2 m k n FLOPs. Norms, RoPE, softmax and the optimizer count nothing, as is usual.
"""

from dataclasses import dataclass

from .derived import Shape, shape
from .errors import UsageError
from .schema import Recipe

DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}
LOSS_CHUNK = 512
"""Positions whose logits stand in memory at once."""
EAGER = 2.0
"""Activations without compiled blocks, relative to with them: the norms' and rotations' float32 steps are kept."""
RESERVE = 0.1
"""Share of a device's memory left to the allocator, the kernels and the communication."""


@dataclass(frozen=True)
class Matmul:
    """A kind of matrix that activations are multiplied by."""

    name: str
    inputs: int
    outputs: int
    stored: int
    """Copies that the model holds: one a layer; 0 for a tied head, which is stored as the embedding."""
    used: int
    """Copies that one token is multiplied by."""
    head: bool = False
    """Part of the head, hence not of `non_embedding`."""

    @property
    def size(self) -> int:
        """Entries of one copy."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `non_embedding` leaves out the embedding AND the head. `active` are those that take part in
    one token's forward pass: all of them, as long as there are no experts."""

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
    """Scores and their use, forward and backward, of the (T + 1) / 2 keys that a query sees on average."""
    attention_full: int
    """The same if every query saw all T keys, as counters do that ignore the mask (PaLM's formula, FlopCounterMode)."""
    total: int
    """Forward and backward, attention included."""


@dataclass(frozen=True)
class Bytes:
    """Bytes on one device that holds the whole model."""

    weights: int
    """Copy of the parameters in the type of the matmuls; 0 in float32, where the master weights are used."""
    master: int
    """float32 parameters."""
    gradients: int
    """float32 sum over the micro-batches, and those of the present one in the type of the matmuls."""
    optimizer: int
    """float32: Muon one moment for each matrix, AdamW two for everything else."""
    activations: int
    """Estimate for one micro-batch: see `activation_bytes`."""
    kv_cache_per_token: int
    """Keys and values of all layers."""
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
    D, H, K, C, F = model.width, model.heads, model.kv_heads, model.head_width, model.hidden
    return [
        Matmul("attention.w_qkv", D, (H + 2 * K) * C, model.layers, model.layers),
        Matmul("attention.w_out", H * C, D, model.layers, model.layers),
        Matmul("feed_forward.w_gate_up", D, 2 * F, model.layers, model.layers),
        Matmul("feed_forward.w_down", F, D, model.layers, model.layers),
        Matmul("head", D, model.vocabulary, 0 if model.tied_embeddings else 1, 1, head=True),
    ]


def parameters(model: Shape) -> Parameters:
    """Counts of the model's parameters."""
    gains = model.layers * (2 * model.width + (2 * model.head_width if model.qk_norm else 0)) + model.width
    embedding = model.vocabulary * model.width
    matrices = sum(one.stored * one.size for one in matmuls(model) if not one.head)
    head = sum(one.stored * one.size for one in matmuls(model) if one.head)
    idle = sum(max(0, one.stored - one.used) * one.size for one in matmuls(model))
    total = embedding + matrices + head + gains
    return Parameters(
        total=total,
        non_embedding=matrices + gains,
        active=total - idle,
        embedding=embedding,
        head=head,
        matrices=matrices,
        vectors=gains,
    )


def flops_per_token(model: Shape) -> Flops:
    """FLOPs of one token, forward and backward."""
    matrices = sum(2 * one.used * one.size for one in matmuls(model))
    per_key = 2 * 2 * model.layers * model.heads * model.head_width
    attention = per_key * (model.context + 1) // 2
    forward = matrices + attention
    return Flops(
        forward=forward,
        backward=2 * forward,
        attention=3 * attention,
        attention_full=3 * per_key * model.context,
        total=3 * forward,
    )


def activation_bytes(model: Shape, micro_tokens: int, dtype_bytes: int = 2, compiled: bool = True) -> int:
    """Estimate of what one micro-batch keeps for its backward pass, without recomputation.

    A compiled layer keeps, for each token: its input, the normed input, queries, keys and values before their norm,
    queries and keys after it, the attention's output, its row of the documents' mask (T), the feed-forward's input and
    normed input, gate, up and their product; the tensors that autograd saves sum to 1.005 of it. The square of scores
    that the CPU's attention keeps comes on top and is not counted. Then the embedding's and the final norm's output,
    and of the chunked cross-entropy the float32 logits of `LOSS_CHUNK` positions with their gradient and the head's
    gradient.
    """
    D, H, K, C, F = model.width, model.heads, model.kv_heads, model.head_width, model.hidden
    layer = 4 * D + (H + 2 * K) * C + (H + K) * C + H * C + model.context + 3 * F
    blocks = micro_tokens * model.layers * layer * dtype_bytes * (1 if compiled else EAGER)
    head = min(LOSS_CHUNK, micro_tokens) * model.vocabulary * 8 + model.vocabulary * D * (4 + dtype_bytes)
    return int(blocks) + micro_tokens * 2 * D * dtype_bytes + head


def optimizer_bytes(counts: Parameters, optimizer: str) -> int:
    """float32 state; an optimizer of the user's own counts as AdamW."""
    moments = 1 if optimizer == "muon" else 2
    return 4 * (moments * counts.matrices + 2 * (counts.total - counts.matrices))


def steps(recipe: Recipe, flops: int, tokens_per_second: float | None = None) -> int | None:
    """Updates of the run: enough for the tokens asked for, as many as the FLOPs or minutes allow, at least one."""
    duration, batch = recipe.duration, recipe.batch.tokens
    if duration.tokens:
        return -(-duration.tokens // batch)
    if duration.flops:
        return max(1, int(duration.flops // (flops * batch)))
    if tokens_per_second is None:
        return None
    return max(1, int(duration.minutes * 60 * tokens_per_second // batch))


def cost(recipe: Recipe, tokens_per_second: float | None = None) -> Cost:
    """What the recipe costs. `tokens_per_second`, of the whole run, gives a duration in minutes its tokens.

    Raises: `UsageError` where the vocabulary is left to a tokenizer, which only `shot data build` reads.
    """
    model = shape(recipe.model)
    if not model.vocabulary:
        raise UsageError(
            "model.vocabulary = 0 leaves the size to the tokenizer, so the cost is unknown: add model.vocabulary=SIZE"
        )
    counts, flops = parameters(model), flops_per_token(model)
    dtype_bytes = DTYPE_BYTES[recipe.parallel.dtype]
    optimizer = optimizer_bytes(counts, recipe.optimizer.name)
    micro_tokens = recipe.parallel.micro_tokens or model.context
    number = steps(recipe, flops.total, tokens_per_second)
    tokens = None if number is None else number * recipe.batch.tokens
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


@dataclass(frozen=True)
class Memory:
    """What fits on one device when each of `ranks` holds the whole model and its share of the batch."""

    ranks: int
    memory: int
    usable: int
    """`memory` without `RESERVE`."""
    fixed: int
    """Weights, gradients and optimizer."""
    micro_tokens: int | None
    """Largest micro-batch that fits and divides the batch; None where not even one sequence does."""
    activations: int
    """Of that micro-batch, or of one sequence where nothing fits."""

    @property
    def fits(self) -> bool:
        """Whether at least one sequence at a time fits."""
        return self.micro_tokens is not None

    @property
    def needed(self) -> int:
        """Bytes with `activations`."""
        return self.fixed + self.activations


def memory(recipe: Recipe, ranks: int = 1, memory: int = 80 * 2**30) -> Memory:
    """What fits into `memory` bytes on each of `ranks` replicas. Replicas save nothing but activations."""
    found = cost(recipe)
    model, context = found.shape, found.shape.context
    dtype_bytes = DTYPE_BYTES[recipe.parallel.dtype]
    rows = recipe.batch.tokens // context
    share = max(1, -(-rows // ranks))
    usable = int(memory * (1 - RESERVE))
    fixed = found.bytes.fixed

    def activations(rows: int) -> int:
        return activation_bytes(model, rows * context, dtype_bytes, recipe.parallel.compile != "off")

    best = next(
        (n for n in range(share, 0, -1) if rows % n == 0 and fixed + activations(n) <= usable),
        None,
    )
    return Memory(
        ranks=ranks,
        memory=memory,
        usable=usable,
        fixed=fixed,
        micro_tokens=None if best is None else best * context,
        activations=activations(best or 1),
    )
