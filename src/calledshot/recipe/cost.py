"""What a recipe costs, by arithmetic alone: parameters, FLOPs, bytes, tokens, hours, money. The project's one counter.

Legend: D width, H query heads, K key and value heads, C head width, F hidden, V vocabulary, T context.
A matmul of (m, k) by (k, n) counts 2 m k n FLOPs. Norms, RoPE, softmax and the optimizer count nothing, as is usual.
"""

from dataclasses import dataclass

from .derived import GATED, Shape, Stack, shape
from .errors import UsageError
from .schema import Recipe

DTYPE_BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}
LOSS_CHUNK = 512
"""Positions whose logits stand in memory at once."""
EAGER = 2.0
"""Activations without compiled blocks, relative to with them: the norms' and rotations' float32 steps are kept."""
RELATIVE_BUCKETS = 32
"""Entries of T5's table for each head."""
RESERVE = 0.1
"""Share of a device's memory left to the allocator, the kernels and the communication."""


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


def pooled(model: Shape) -> list[int]:
    """Positions that each layer of the encoder works on."""
    halvings = model.encoder_pooling.bit_length() - 1
    layers, length, lengths = model.encoder_layers, model.encoder_context, []
    for number in range(halvings + 1):
        if number:
            length = -(-length // 2)
        lengths += [length] * (layers * (number + 1) // (halvings + 1) - layers * number // (halvings + 1))
    return lengths


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


def activation_bytes(model: Shape, micro_tokens: int, dtype_bytes: int = 2, compiled: bool = True) -> int:
    """Estimate of what one micro-batch keeps for its backward pass, without recomputation.

    A compiled layer keeps, for each token: its input, the normed input, queries, keys and values before their norm,
    queries and keys after it, the attention's output, its row of the documents' mask (T), the feed-forward's input and
    normed input, gate, up and their product; the tensors that autograd saves sum to 1.005 of it. The square of scores
    that the CPU's attention keeps comes on top and is not counted. Then the embedding's and the final norm's output,
    and of the chunked cross-entropy the float32 logits of `LOSS_CHUNK` positions with their gradient and the head's
    gradient.
    """
    rows = micro_tokens / model.row_positions
    across = pooled(model)
    kept = 0.0
    for stack in model.stacks:
        D, H, K, C = stack.width, stack.heads, stack.kv_heads, model.head_width
        parts = 3 if model.feed_forward in GATED else 2
        hidden = parts * stack.hidden
        if model.experts:
            hidden = parts * (model.top_k * model.expert_hidden + model.shared_expert_hidden) + 2 * model.top_k * D
        layer = 4 * D + (H + 2 * K) * C + (H + K) * C + H * C + hidden
        if stack.cross_width:
            layer += 2 * D + 3 * H * C + across[-1]
        lengths = [model.context] * stack.layers if stack.ordered else across
        kept += sum(rows * length * (layer + length) for length in lengths) + 2 * rows * lengths[0] * D
    blocks = kept * dtype_bytes * (1 if compiled else EAGER)
    head = min(LOSS_CHUNK, micro_tokens) * model.vocabulary * 8 + model.vocabulary * model.width * (4 + dtype_bytes)
    return int(blocks) + head


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
    micro_tokens = recipe.parallel.micro_tokens or model.row_positions
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
    model, context = found.shape, found.shape.row_positions
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
