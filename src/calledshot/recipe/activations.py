"""What a pass holds beside parameters and their gradients, by arithmetic: what is kept for the backward, and what the
work takes for a while.

Legend: N positions of a micro-batch on this rank, S keys, D width, H query heads, K key and value heads, C head width,
F hidden, R rows of experts, V vocabulary. `e` is the bytes of an entry in the type of the matmuls.

Every entry of the lists is a tensor that the trunk's code makes, read off what lives at the fullest moment
(`benchmarks/memory.py`). Eager work keeps what each operation asks for, compiled work what cannot be made again
cheaply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .derived import GATED, RELATIVE_BUCKETS, Shape, Stack, pooled
from .layout import Layout

BLOCKED_CONTEXT = 2048
"""Longest row of a CPU's compiled blocks, whose attention keeps its weights (`model.attention`)."""
MASK_ENTRIES = 2**26
"""Entries of a mask that stand together where a CPU has to write it out (`model.attention`)."""
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**28}
"""Most logits that stand together (`model.loss`)."""
LEAST_CHUNK = 64
TILE = 64
"""Most rows that an expert's share is padded to a multiple of (`model.routing`)."""


@dataclass(frozen=True)
class Setting:
    """How a rank computes."""

    device: str = "cuda"
    """`cuda` or `cpu`."""
    dtype_bytes: int = 2
    """Of the type of the matmuls."""
    compiled: bool = True
    """Whether blocks are compiled."""
    checkpointing: str = "none"
    """As `parallel.activation_checkpointing`."""


@dataclass(frozen=True)
class Part:
    """A piece of a pass, in the order of the forward; bytes."""

    kept: float
    """From its forward to its backward."""
    forward: float = 0.0
    """Most that stands while it computes, beside what the parts before it keep."""
    backward: float = 0.0
    """The same during its backward, but for gradients of parameters."""
    parameters: int = 0
    """Entries of the parameters that it uses, without those of experts that other ranks do not have."""
    apart: int = 0
    """Entries of those."""
    gradients: float = 0.0
    """Bytes of gradients that its backward leaves."""
    block: bool = False
    """Whether it is a block of a stack."""


def joined(parts: Iterable[Part]) -> Part:
    """The branches of a block as one."""
    kept = forward = backward = gradients = 0.0
    parameters = apart = 0
    for part in parts:
        forward = max(forward, kept + part.forward, kept + part.kept)
        backward = max(backward, kept + part.backward)
        kept, gradients = kept + part.kept, gradients + part.gradients
        parameters, apart = parameters + part.parameters, apart + part.apart
    return Part(kept, forward, backward, parameters, apart, gradients, block=True)


def fullest(parts: list[Part]) -> float:
    """Most bytes that stand at one time of a forward and backward pass: from the last part to the first, what was kept
    goes and gradients come.
    """
    whole = joined(parts)
    kept, most, gradients = whole.kept, whole.forward, 0.0
    for part in reversed(parts):
        kept -= part.kept
        gradients += part.gradients
        most = max(most, kept + part.backward + gradients)
    return most


def passing(model: Shape, rows: float, layout: Layout, setting: Setting) -> list[Part]:
    """The parts of a pass over `rows` sequences, on one rank of the layout; under FSDP, every block as one."""
    N = rows * model.context / layout.context
    across = pooled(model)
    parts: list[Part] = []
    for stack in model.stacks:
        lengths = [model.context] * stack.layers if stack.ordered else across
        positions = N if stack.ordered else rows * lengths[0]
        parts.append(_embedding(model, stack, positions, setting))
        masks = {length: _masks(model, stack, rows, length, layout, setting) for length in set(lengths)}
        if across and stack.ordered:
            masks[model.context] += _mask(rows, model.context, across[-1], 1, False, setting)
        if setting.checkpointing != "none":  # what is computed again needs them again
            parts.append(Part(sum(masks.values())))
        for number, length in enumerate(lengths):
            block = _block(model, stack, number, rows, length, across[-1] if across else 0, layout, setting)
            stand = 0.0 if setting.checkpointing != "none" else masks[length]
            parts += [replace(part, forward=part.forward + stand) for part in block]
        parts.append(_between(model, stack.width, N if stack.ordered else rows * lengths[-1], setting))
    parts.append(_loss(model, N, layout, setting))
    e = setting.dtype_bytes
    parts = [replace(part, gradients=e * (part.parameters + part.apart)) for part in parts]
    if layout.shard == 1:
        return parts
    # In the loss the last block's buffer is still there.
    parts[-1] = replace(parts[-1], forward=parts[-1].forward + e * parts[-3].parameters)
    return [_gathered(part, layout, setting) if part.block else part for part in parts]


def _gathered(block: Part, layout: Layout, setting: Setting) -> Part:
    """A block under FSDP2, whose parameters come before each of its passes and whose gradients go after."""
    e, P = setting.dtype_bytes, block.parameters
    # Gloo copies what it gathers and what it sums.
    copies = 1 if setting.device == "cpu" else 0
    whole, left = e * P, 4 * P / (layout.shard * layout.context)
    # Its own, and the buffer that was gathered last or for the next; and the gradients.
    forward = max((2 + copies) * whole, 2 * whole + block.forward)
    computing = 3 * whole + block.backward
    # Gradients as they were made, in float32 for the sum, and this rank's share, which stays.
    reducing = (1 + copies) * whole + (e + 4 + 4 * copies) * P
    gradients = left + e * block.apart
    return replace(block, forward=forward, backward=max(computing, reducing), gradients=gradients)


def _block(
    model: Shape, stack: Stack, number: int, rows: float, length: int, encoded: int, layout: Layout, setting: Setting
) -> list[Part]:
    """A block's branches; with activation checkpointing, the block as one."""
    local = rows * length / (layout.context if stack.ordered else 1)
    branches = [_attention(model, stack, rows, length, length, layout, setting)]
    if stack.cross_width:
        branches.append(_attention(model, stack, rows, length, encoded, layout, setting, cross=True))
    sparse = model.experts and number >= model.dense_layers
    branches.append((_experts if sparse else _feed_forward)(model, stack, local, layout, setting))
    if setting.checkpointing == "none":
        return branches if layout.shard == 1 else [joined(branches)]
    block = joined(branches)
    stream = kept = setting.dtype_bytes * stack.width * local
    if setting.checkpointing == "selective":
        kept += sum(_products(model, stack, rows, length, encoded, bool(sparse), layout, setting))
    # The block is computed once more before its backward, and then keeps what it would have kept, the products and the
    # stream among it; but eager, the stream only as a copy in float32.
    again = 0 if setting.compiled or setting.dtype_bytes == 4 else stream
    backward = max(kept, again + block.forward, again + block.backward)
    return [replace(block, kept=kept, forward=kept + block.forward, backward=backward)]


def _products(
    model: Shape, stack: Stack, rows: float, length: int, encoded: int, sparse: bool, layout: Layout, setting: Setting
) -> Iterator[float]:
    """Bytes of what a block's matrices, its fused attention and other ranks gave (`model.block.keep_products`)."""
    e, D, C, t = setting.dtype_bytes, stack.width, model.head_width, layout.tensor
    H, K = stack.heads / t, stack.kv_heads / t
    parts = layout.context if stack.ordered else 1
    N, up = rows * length / parts, 2 if model.feed_forward in GATED else 1
    ends = (2 if t > 1 else 1) * e * D * N
    yield e * (H + 2 * K) * C * N + ends
    if not _blocked(length, length, setting):
        yield (e * C + 4) * H * N
    if parts > 1:
        yield 2 * e * K * C * rows * length
    if stack.cross_width:
        yield e * C * (H * N + 2 * K * rows * encoded) + ends
        if not _blocked(length, encoded, setting):
            yield (e * C + 4) * H * N
    if sparse:
        yield e * _rows(model, N, layout) * (up * model.expert_hidden / t + D) + 4 * model.experts * N
        yield e * N * (up * model.shared_expert_hidden / t + D) if model.shared_expert_hidden else 0
    else:
        # What the branch ends in is kept where nobody sees that it is not needed.
        yield e * up * stack.hidden / t * N + (0 if setting.compiled else ends)


def _blocked(length: int, keys: int, setting: Setting) -> bool:
    """Whether attention is computed in blocks of plain products."""
    return setting.device == "cpu" and setting.compiled and max(length, keys) <= BLOCKED_CONTEXT


def _around(model: Shape, stack: Stack, setting: Setting) -> tuple[float, float]:
    """Bytes a position that a branch's norm and sum keep, and that stand during the norm's backward."""
    e, D = setting.dtype_bytes, stack.width
    sandwich = model.norm_placement == "sandwich"
    if setting.compiled:
        # The stream or what is added to it, and the normed. An end that is normed too is kept, and is what the next
        # branch would keep, but for the last branch's: half of one, over two branches.
        return (2.5 if sandwich else 2) * e * D, 2 * e * D
    # The stream in float32, the normed in float32 before its gain, and the normed. In the backward five float32 tensors
    # stand beside the stream and its gradient.
    return 8 * D * (2 if sandwich else 1) + e * D, 24 * D + e * D


def _attention(
    model: Shape, stack: Stack, rows: float, length: int, keys: int, layout: Layout, setting: Setting, *,
    cross: bool = False,
) -> Part:  # fmt: skip
    """Norm, queries, keys and values, their own norms and rotation, the products with softmax, and the projection."""
    e, D, C, t = setting.dtype_bytes, stack.width, model.head_width, layout.tensor
    H, K = stack.heads / t, stack.kv_heads / t
    parts = layout.context if stack.ordered else 1
    N, S = rows * length / parts, rows * keys
    local = S if cross else N  # keys that this rank makes
    around, norm_backward = (each * N for each in _around(model, stack, setting))
    products = e * C * ((H * N + 2 * K * S) if cross else (H + 2 * K) * N)
    stream, outputs = e * D * N, e * H * C * N
    queries, both = e * H * C * N, e * C * (H * N + 2 * K * S)
    biased = model.positions == "t5" and not cross
    pairs = H * N * keys
    standing, working = 0.0, outputs + both + stream
    if _blocked(length, keys, setting):
        # Queries, keys and values as the products with scores want them, and the weights of each block of rows.
        first, last, seen = (e * H * rows * each for each in _row_blocks(length // parts, keys, _causal(model, cross)))
        inside = (products if model.qk_norm else 0) + both + seen
        # Scores of a block stand in the type of the products and in float32; in float32 the weights take their place.
        standing = last * (1 + 4 / e) if e < 4 else 0.0
        # From the smallest block on, each block's gradient takes the place of what the one before kept; with a bias by
        # head, whose gradient is made of all of them, they stand together.
        working = first + outputs + queries + stream + (seen if biased else 0)
    elif setting.compiled:
        inside = (products if model.qk_norm else e * K * C * S) + both - e * K * C * S + 4 * H * N
    else:
        turned = model.qk_norm or (model.positions == "rope" and not cross)
        normed = ((4 if e < 4 else 0) + 4) * C * (H * N + K * local) if model.qk_norm else 0
        inside = products + normed + (e * C * (H * N + K * S) if turned else queries) + 4 * H * N
        if parts > 1:  # values come from the other ranks and are no view of the products any more
            inside += e * K * C * S - (products if model.qk_norm and e < 4 else 0)
        if biased and setting.device == "cpu" and pairs <= MASK_ENTRIES:
            # SDPA as plain products: weights, and queries, keys and values of all heads, in float32; the mask. For a
            # while the bias of every row and head, scores in float32, and which of them are -inf.
            inside = normed + 4 * (pairs + H * C * (N + 2 * S)) + N * keys
            standing = (e + 4 + 1) * pairs
            working += (e + 4) * pairs
        # Gradients of queries pass through their norm when scores and outputs are gone.
        working = max(working, 16 * H * C * N - outputs - stream) if model.qk_norm else working
    if setting.device == "cpu" and not _blocked(length, keys, setting):
        if pairs * (1 if biased else 1 / H) > MASK_ENTRIES:
            standing = (1 + e) * MASK_ENTRIES  # of so many queries at a time, and again in the backward
            working += standing
        elif setting.compiled or not biased:
            inside += e * N * keys  # the mask, in the type of the scores
    if biased:
        working += e * H * length * keys / parts  # the gradient of the table, spread over pairs
    kept = around + inside + outputs
    source = stack.cross_width if cross else D
    parameters = (D * stack.heads + 2 * source * stack.kv_heads) * C // t + D * stack.heads * C // t
    parameters += D * (2 if model.norm_placement == "sandwich" else 1) + (2 * C if model.qk_norm else 0)
    return Part(kept, kept - outputs + standing, max(kept + working, norm_backward), parameters)


def _masks(model: Shape, stack: Stack, rows: float, length: int, layout: Layout, setting: Setting) -> float:
    """Bytes of what is added to the scores of all layers of a stack, which stands while they compute: 0 or -inf, and
    T5's bias by head."""
    heads = stack.heads if model.positions == "t5" else 0
    parts = layout.context if stack.ordered else 1
    return _mask(rows, length // parts, length, heads + 1, stack.ordered and _causal(model), setting)


def _mask(rows: float, length: int, keys: int, kinds: int, causal: bool, setting: Setting) -> float:
    """Bytes of a mask for all rows, and so many others for all rows together."""
    pairs = setting.dtype_bytes * _row_blocks(length, keys, causal)[2]
    return pairs * (rows * _blocked(length, keys, setting) + kinds - 1)


def _causal(model: Shape, cross: bool = False) -> bool:
    """Whether blocks of rows leave out the keys after them."""
    return model.topology == "decoder" and not cross


def _row_blocks(length: int, keys: int, causal: bool) -> tuple[float, float, float]:
    """Pairs of a query and a key in the first and in the last block of rows, and in all (`model.attention.Mask`)."""
    blocks = next((n for n in (4, 2) if length % n == 0 and length // n >= 64), 1)
    height = length // blocks
    # The last of the ranks that share a row sees all that came before.
    sizes = [height * (keys - length + height * (n + 1) if causal else keys) for n in range(blocks)]
    return sizes[0], sizes[-1], sum(sizes)


def _feed_forward(model: Shape, stack: Stack, N: float, layout: Layout, setting: Setting) -> Part:
    """Norm, the matrices up, the activation and the matrix down."""
    e, D, F = setting.dtype_bytes, stack.width, stack.hidden / layout.tensor
    gated = model.feed_forward in GATED
    around, norm_backward = (each * N for each in _around(model, stack, setting))
    # Gate and up, their product, and eager the activated gate; or up where it is not gated, and the activated.
    kept = around + e * F * N * ((3 if setting.compiled else 4) if gated else 2)
    # Gradients of the product and of what made it, when the product itself is gone; and the stream's.
    working = e * N * (D + (2 if gated else 1) * F)
    parameters = (3 if gated else 2) * D * stack.hidden // layout.tensor
    parameters += D * (2 if model.norm_placement == "sandwich" else 1)
    return Part(kept, kept + e * D * N, max(kept + working, norm_backward), parameters)


def _experts(model: Shape, stack: Stack, N: float, layout: Layout, setting: Setting) -> Part:
    """Norm, router, the rows of each expert on their way through it, and the expert that all tokens go to."""
    e, D, t = setting.dtype_bytes, stack.width, layout.tensor
    F, shared = model.expert_hidden / t, model.shared_expert_hidden / t
    up = 2 if model.feed_forward in GATED else 1
    # Eager, the activated gate is kept too, and of experts what is activated before its weight.
    more = 0 if setting.compiled else up - 1
    local = model.experts // layout.expert
    choices = N * model.top_k
    R = _rows(model, N, layout)
    around, norm_backward = (each * N for each in _around(model, stack, setting))
    rows = e * R * (D + (up + 1 + more + (not setting.compiled)) * F)
    # Indices and weights of rows and choices; logits and scores of experts and the router's input in float32.
    routing = 12 * R + 24 * choices + 8 * model.experts * N + (4 * D * N if e < 4 else 0)
    # The normed in the matmuls' type is read by the shared expert alone.
    everybody = e * N * (up + 1 + more) * shared - (0 if shared or e == 4 else e * D * N)
    kept = around + rows + routing + everybody
    # Gradients of the rows before and after the experts' matrices, of the product and what made it, and the stream's.
    working = e * N * D + e * R * (D + (up + 1) * F)
    mine = (up + 1) * D * local * model.expert_hidden // t
    parameters = (up + 1) * D * model.shared_expert_hidden // t
    parameters += D * model.experts + D * (2 if model.norm_placement == "sandwich" else 1)
    alone, apart = (mine, 0) if layout.expert == 1 else (0, mine)
    return Part(kept, kept + e * R * D, max(kept + working, norm_backward), parameters + alone, apart)


def _rows(model: Shape, N: float, layout: Layout) -> float:
    """Rows of all experts of a rank, each expert's padded to a multiple (`model.routing.tile_rows`); those that other
    ranks send are taken to be as many as those that it sends."""
    choices = N * model.top_k
    tile = min(TILE, 1 << max(0, (int(choices) // (32 * model.experts)).bit_length() - 1))
    return choices + min(choices, model.experts // layout.expert) * (tile - 1)


def _embedding(model: Shape, stack: Stack, N: float, setting: Setting) -> Part:
    """The table's lookup, and the cosines and sines of its stack in float32; what the first block keeps of it, that
    counts.
    """
    angles = 4 * model.head_width * N if model.positions == "rope" else 0
    stream = setting.dtype_bytes * stack.width * N
    table = RELATIVE_BUCKETS * stack.heads if model.positions == "t5" else 0
    return Part(angles, angles + stream, angles + stream, model.vocabulary * stack.width + table)


def _between(model: Shape, width: int, N: float, setting: Setting) -> Part:
    """A stack's last norm, which is never compiled: the stream and the normed before its gain, in float32."""
    if model.norm_placement == "post":
        return Part(0.0)
    return Part(8 * width * N, (8 + setting.dtype_bytes) * width * N, 24 * width * N, width)


def chunk_tokens(model: Shape, N: float, layout: Layout, setting: Setting) -> float:
    """Tokens whose logits stand in memory together (`model.loss`)."""
    return min(N / layout.tensor, max(LEAST_CHUNK, CHUNK_LOGITS[setting.device] // model.vocabulary))


def _loss(model: Shape, N: float, layout: Layout, setting: Setting) -> Part:
    """The head and cross-entropy in chunks, whose gradients are made in the forward and kept."""
    e, D, V = setting.dtype_bytes, model.width, model.vocabulary
    chunk = chunk_tokens(model, N, layout, setting)
    chunks = -(-N / layout.tensor // chunk)
    logits, head, hidden = chunk * V, D * V, e * D * N
    gradient = hidden / layout.tensor
    if setting.compiled:
        work, total = e * logits, (e + 8) * head
    else:
        # Float32 logits where they are not that already, the same capped, and two steps of their gradient.
        work = logits * (8 + (4 if e < 4 else 0) + (8 if model.softcap else 0))
        total = (e + 8 + (4 if e < 4 else 0)) * head
    # The head's gradient is summed over the chunks in float32: two sums and a summand. Beside a third chunk stand the
    # sum before it and its summand; beside a second, these are one.
    before = {1: 0, 2: e}.get(int(chunks), 4 + e) * head
    standing = max(work + before, total if chunks > 1 else e * head)
    return Part(gradient + e * head, hidden + gradient + standing, gradient + hidden, head)
