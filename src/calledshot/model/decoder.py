"""The trunk: one stack of blocks, or an encoder's and a decoder's, for every topology.

Shapes, as suffixes: B batch, T target length, S source length, D width, H query heads, K key/value heads, G = H / K,
C head width, F hidden, V vocabulary.

Parameters are stored so that the last two axes are always one matrix and the axes before it a batch of independent ones
(heads, the two halves of the gate, experts): Muon orthogonalises the last two. Ranks may have parts (parallel.py).

| parameter | shape | initialised |
|---|---|---|
| embedding_VD | (V, D) | normal, 1 (where it is the head too: D ** -0.75) |
| blocks.N.qkv_KXCD | (K, G + 2, C, D) | normal, 1 / sqrt(D); per key head its G query heads, then key, then value |
| blocks.N.out_DHC | (D, H * C) | zero |
| blocks.N.cross_query_KGCD, cross_key_value_K2CD | (K, G, C, D), (K, 2, C, S's D) | normal, 1 / sqrt(last axis) |
| blocks.N.cross_out_DHC | (D, H * C) | zero |
| blocks.N.gate_up_2FD, or up_FD where not gated | (2, F, D), (F, D) | normal, 1 / sqrt(D) |
| blocks.N.down_DF | (D, F) | zero |
| blocks.N.experts.… | see experts.py | as the dense feed-forward; the router normal, 1 / sqrt(D) |
| head_VD, unless tied | (V, D) | zero |
| relative_bias_HR (T5's positions) | (H, 32) | zero |
| gains | (D,) or (C,) | one |
| encoder.… | the encoder's blocks, final norm, bias, and embedding where its width is another | as above |

Zero at the ends of the branches and at a head of its own makes the first logits uniform at every width and depth, and
leaves the growth to the learning rates, which transfer (`recipe.transfer`). Sandwich norms would blow a zero branch up:
their branches end in normal, 1 / sqrt(last axis), and their own gains begin at 1 / sqrt(branches), so that the stream
ends at about twice the embedding's variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from calledshot.model.attention import Mask, Seen, ready
from calledshot.model.block import Block, Crossing, LayerCache, normalize, stacked
from calledshot.model.cache import Cache
from calledshot.model.collectives import Group, copy_to, gather_over, reduce_from
from calledshot.model.encoder import Encoder, EncoderInputs, pool
from calledshot.model.loss import cap, chunked_cross_entropy, token_losses
from calledshot.model.packing import can_pack, pack, packed_linear
from calledshot.model.parallel import Cut, share_experts, share_matrices, share_positions, shares_experts
from calledshot.model.positions import relative_bucket, rotary
from calledshot.model.routing import Auxiliary
from calledshot.recipe import UsageError, schema, shape

CACHE_SCORES = 2**26
"""Scores over a cache that stand in memory together."""


ENDS = ("out_DHC", "cross_out_DHC", "down_DF", "down_EDF", "shared_down_DF")
"""Parameters that branches end in."""


@dataclass(frozen=True)
class Reading:
    """How a prompt is put to a model, as its objective had it: ids around the prompt, and how it is seen."""

    before: tuple[int, ...] = ()
    """A mode token, say."""
    after: tuple[int, ...] = ()
    """A sentinel where the rest belongs, say."""
    start: tuple[int, ...] = ()
    """What the targets begin with; an encoder-decoder's decoder begins with the begin token."""
    two_way: bool = False
    """Whether all but `start` see each other both ways; an encoder's inputs always do."""


class Decoder(nn.Module):
    """The model as `recipe.model` describes it, made on the default device, not yet initialised (`initialise`)."""

    def __init__(self, config: schema.Model) -> None:
        super().__init__()
        self.config, self.derived = config, shape(config)
        derived = self.derived
        self.embedding_VD = nn.Parameter(torch.empty(derived.vocabulary, config.width))
        self.blocks = stacked(derived, derived.decoder)
        self.final_norm_D = None if config.norm_placement == "post" else nn.Parameter(torch.empty(config.width))
        self.separate_head_VD = (
            None if config.tied_embeddings else nn.Parameter(torch.empty(derived.vocabulary, config.width))
        )
        self.relative_bias_HR = nn.Parameter(torch.empty(config.heads, 32)) if config.positions == "t5" else None
        self.encoder = None if derived.encoder is None else Encoder(derived, derived.encoder)
        self.reading = Reading()
        self.records: list[Auxiliary] = []
        """What the experts of each layer said in the last pass of `loss`."""
        self.blocked_attention = True
        """Whether the CPU takes the path for compiled blocks."""
        self.compiled = False
        self.hooked = False
        """Whether something hangs on the calls of blocks (FSDP gathers their parameters) that none may go around."""
        self.packed_head: Tensor | None = None
        self.cuts: dict[str, Cut] = {}
        """Of the parameters that ranks have parts of, by name."""
        self.tensor: Group | None = None
        self.context: Group | None = None

    @property
    def head_VD(self) -> Tensor:
        return self.embedding_VD if self.separate_head_VD is None else self.separate_head_VD

    @property
    def all_blocks(self) -> list[Block]:
        """Of both stacks, the encoder's first."""
        return [*(self.encoder.blocks if self.encoder is not None else ()), *self.blocks]  # ty: ignore

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fill all parameters in place, in float32, from one generator on their device (table at the top of the
        file).
        """
        for name, parameter in self.named_parameters():
            self.initial(name, parameter, generator)
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def initial(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place, given whole. In the order of `named_parameters`, one after another from one
        generator, all become what `initialise` makes of them, whoever keeps which part.
        """
        sandwich = self.config.norm_placement == "sandwich"
        own = self.config.layers * (2 if self.encoder is None else 3)
        branches = {"blocks": own, "encoder": 2 * self.derived.encoder_layers}
        kind = name.rpartition(".")[2]
        if kind == "embedding_VD":
            # An encoder of another width has a table of its own, which is no head either.
            is_head = self.config.tied_embeddings and name == kind
            whole.normal_(0.0, self.config.width**-0.75 if is_head else 1.0, generator=generator)
        elif kind in ("separate_head_VD", "relative_bias_HR") or (kind in ENDS and not sandwich):
            whole.zero_()
        elif kind.endswith(("norm_D", "norm_C")):
            post = kind.endswith("post_norm_D")
            whole.fill_(branches[name.partition(".")[0]] ** -0.5 if post else 1.0)
        else:
            whole.normal_(0.0, whole.size(-1) ** -0.5, generator=generator)

    # Ranks that share the model: to be called on the meta device, in this order. A group of one rank changes nothing.

    def parallelize_tensor(self, group: dist.ProcessGroup) -> None:
        """Each rank has a part of every layer's heads and hidden widths (Shoeybi et al. 2019, arXiv 1909.08053), which
        they must divide; embedding, head and gains, all have whole, and their gradients too.

        The ranks call everything alike, with the same tokens, and are given the same.
        """
        if group.size() > 1:
            self.tensor = Group.of(group)
            self.cuts |= share_matrices(self, self.tensor)

    def parallelize_experts(self, group: dist.ProcessGroup) -> None:
        """Each rank has some experts of every layer, and tokens go to where theirs are (Lepikhin et al. 2020, arXiv
        2006.16668), however many: none is dropped. An expert's gradient is the sum over all ranks' tokens.

        The ranks call everything equally often, each with tokens of its own. UsageError beside tensor parallelism.
        """
        if group.size() > 1:
            if self.tensor is not None:
                raise UsageError(
                    "parallel.tensor and parallel.expert would both cut the experts' matrices: set one of them to 1"
                )
            self.cuts |= share_experts(self, Group.of(group))

    def parallelize_context(self, group: dist.ProcessGroup) -> None:
        """Each rank has an equal part of the positions of the same rows, in order, and sees the keys and values of all.

        Inputs of `hidden_states`, `loss` and `token_losses` are this rank's columns (`BatchTensors.columns`), and so is
        what they give: the rows' loss is the sum over the ranks. With a cache each reads whole rows by itself.
        UsageError for encoder-decoders.
        """
        if group.size() > 1:
            if self.encoder is not None:
                raise UsageError("parallel.context shares the positions of a decoder alone: set parallel.context=1")
            self.context = Group.of(group)
            share_positions(self, self.context)

    def checkpoint_blocks(self, kind: str) -> None:
        """What the backward computes again instead of keeping it (Chen et al. 2016, arXiv 1604.06174): `none`; `full`,
        all of a block but its input; `selective`, what is cheap: all but products with matrices, fused attention and
        what other ranks gave.
        """
        for block in self.all_blocks:
            block.checkpointing = kind

    def compile_blocks(self) -> None:
        """Compile each block (one graph serves all of a stack) and the loss. Whole-model compilation took 58 to 115 s
        here, this 20 to 45.
        """
        if shares_experts(self):
            # How many rows a rank's experts get is known only when they come.
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
        for block in self.all_blocks:
            block.compile(dynamic=False)
        self.compiled = True

    def _stack(
        self, blocks: nn.ModuleList, x_BTD: Tensor, positions_BT: Tensor, seen: Seen, crossing: Crossing | None = None
    ) -> Tensor:
        real_BT = None
        if self.config.experts and seen.mask.documents_BT is not None:
            real_BT = seen.mask.documents_BT >= 0
        cos, sin = self._rotary(positions_BT, encoder=not seen.mask.ordered)
        for block in blocks:
            # Compiled code is for training: without gradients each new shape would be compiled once more.
            run = block if torch.is_grad_enabled() else self._uncompiled(block)
            x_BTD, record = run(x_BTD, cos, sin, seen, crossing, None, real_BT)
            if record is not None:
                self.records.append(record)
        return x_BTD

    def _uncompiled(self, block: nn.Module) -> Callable[..., tuple[Tensor, Auxiliary | None]]:
        return block._call_impl if self.hooked else block.forward

    def _rotary(self, positions_BT: Tensor, *, encoder: bool = False) -> tuple[Tensor | None, Tensor | None]:
        if self.config.positions != "rope":
            return None, None
        return rotary(positions_BT, self.derived, self.derived.head_width, encoder=encoder)

    def _ready(self, mask: Mask, table_HR: Tensor | None = None) -> Seen:
        like = self.embedding_VD
        return ready(mask, like.device, like.dtype, blocked=self.blocked_attention, table_HR=self._own_heads(table_HR))

    def _own_heads(self, table_HR: Tensor | None) -> Tensor | None:
        """The rows of a table of positions that are of this rank's heads."""
        if table_HR is None or self.tensor is None:
            return table_HR
        return copy_to(table_HR, self.tensor).chunk(self.tensor.size)[self.tensor.rank]

    def _mask(self, T: int, documents_BT: Tensor | None, regions_BT: Tensor | None, like: Tensor) -> Mask:
        """Of this rank's columns on all of the row's."""
        group = self.context
        if group is None:
            return Mask(T, T, documents_BT=documents_BT, regions_BT=regions_BT)
        documents_BT = torch.zeros_like(like) if documents_BT is None else documents_BT
        return Mask(
            T, group.size * T, True, documents_BT, gather_over(documents_BT, group, 1),
            regions_BT, None if regions_BT is None else gather_over(regions_BT, group, 1), group.rank * T,
        )  # fmt: skip

    def _normalized(self, x: Tensor, gain_D: Tensor | None) -> Tensor:
        return x if gain_D is None else normalize(x, gain_D, self.config.norm_epsilon, self.config.norm)

    def encode(self, inputs: EncoderInputs) -> tuple[Tensor, Tensor | None]:
        """What the encoder makes of its inputs: states (B, S', D) and their documents (B, S'), S' being S over
        `encoder_pooling`, rounded up at each halving.
        """
        assert self.encoder is not None
        tokens_BS, positions_BS, documents_BS = inputs.tokens_BS, inputs.positions_BS, inputs.documents_BS
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.size(1), device=tokens_BS.device)[None].expand_as(tokens_BS)
        table = self.embedding_VD if self.encoder.embedding_VD is None else self.encoder.embedding_VD
        x_BSD = F.embedding(tokens_BS, table)
        blocks, halvings = self.encoder.blocks, self.config.encoder_pooling.bit_length() - 1
        # Evenly between the layers: after layers * 1 / (halvings + 1), 2 / (halvings + 1), ...
        ends = [len(blocks) * (number + 1) // (halvings + 1) for number in range(halvings + 1)]
        start = 0
        for number, end in enumerate(ends):
            if number:
                x_BSD, positions_BS, documents_BS = pool(x_BSD, positions_BS, documents_BS)
            mask = Mask(x_BSD.size(1), x_BSD.size(1), ordered=False, documents_BT=documents_BS)
            seen = self._ready(mask, self.encoder.relative_bias_HR)
            x_BSD = self._stack(blocks[start:end], x_BSD, positions_BS, seen)  # ty: ignore
            start = end
        return self._normalized(x_BSD, self.encoder.final_norm_D), documents_BS

    def hidden_states(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        *,
        regions_BT: Tensor | None = None,
        encoder_inputs: EncoderInputs | None = None,
    ) -> Tensor:
        """Normalised states (B, T, D) before the head. `tokens_BT` int; positions default to 0, 1, 2, ...

        With a cache, the new keys and values are written at `positions_BT` and everything up to a token's own position
        is seen; without positions its rows begin anew. `documents_BT` must be None then. An encoder reads
        `encoder_inputs`, with a cache only where rows begin: what it gave stays in the cache.
        """
        if cache is not None:
            return self._cached(tokens_BT, positions_BT, cache, regions_BT, encoder_inputs)
        T = tokens_BT.size(1)
        mask = self._mask(T, documents_BT, regions_BT, tokens_BT)
        if positions_BT is None:
            positions_BT = (mask.first + torch.arange(T, device=tokens_BT.device))[None].expand_as(tokens_BT)
        seen = self._ready(mask, self.relative_bias_HR)
        crossing = None
        if self.encoder is not None:
            assert encoder_inputs is not None
            encoded_BSD, documents_BS = self.encode(encoder_inputs)
            if documents_BT is None and documents_BS is not None:
                documents_BT = torch.zeros_like(tokens_BT)
            keys_BS = documents_BS
            if documents_BT is not None and documents_BS is None:
                keys_BS = torch.zeros(encoded_BSD.shape[:2], dtype=documents_BT.dtype, device=documents_BT.device)
            across = Mask(T, encoded_BSD.size(1), False, documents_BT, key_documents_BS=keys_BS)
            crossing = Crossing(encoded_BSD, self._ready(across))
        x_BTD = self._stack(self.blocks, F.embedding(tokens_BT, self.embedding_VD), positions_BT, seen, crossing)
        return self._normalized(x_BTD, self.final_norm_D)

    def _cached(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None,
        cache: Cache,
        regions_BT: Tensor | None,
        encoder_inputs: EncoderInputs | None,
    ) -> Tensor:
        cross_bias_B1S, begins = cache.cross_bias_B1S, positions_BT is None
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = torch.arange(T, device=tokens_BT.device)[None].expand_as(tokens_BT)
        reach = max(cache.encoded, 0 if begins else cache.capacity)
        piece = max(1, CACHE_SCORES // max(1, B * self.config.heads * reach))
        if piece < T:
            parts = []
            for start in range(0, T, piece):
                new = slice(start, start + piece)
                at_BT = positions_BT[:, new]
                reached = cache.part(slice(B), int(at_BT.max()) + 1)
                first = encoder_inputs if not start else None
                parts.append(
                    self._cached(tokens_BT[:, new], None if begins and not start else at_BT, reached, regions_BT, first)
                )
            return torch.cat(parts, 1)
        encoded_BSD = None
        if encoder_inputs is not None and cross_bias_B1S is not None:
            encoded_BSD = self._encode_to_keep(encoder_inputs, cross_bias_B1S)
        x_BTD = F.embedding(tokens_BT, self.embedding_VD)
        cos, sin = self._rotary(positions_BT)
        seen = bias_BTS = head_bias_BHTS = None
        if begins:
            seen = self._ready(Mask(T, T, regions_BT=regions_BT), self.relative_bias_HR)
        else:
            position_S = torch.arange(cache.capacity, device=tokens_BT.device)
            distance_BTS = position_S - positions_BT[..., None]
            bias_BTS = torch.zeros(distance_BTS.shape, device=x_BTD.device).masked_fill_(distance_BTS > 0, -torch.inf)
            if (table_HR := self._own_heads(self.relative_bias_HR)) is not None:
                head_bias_BHTS = table_HR[:, relative_bucket(distance_BTS, ordered=True)].transpose(0, 1)
        for number, block in enumerate(self.blocks):
            layer = LayerCache(cache.keys[number], cache.values[number], positions_BT, bias_BTS, head_bias_BHTS)
            crossing = None
            if self.encoder is not None:
                cross = cache.cross_keys[number], cache.cross_values[number]
                crossing = Crossing(encoded_BSD, None, *cross, cross_bias_B1S)
            x_BTD, _ = self._uncompiled(block)(x_BTD, cos, sin, seen, crossing, layer)
        return self._normalized(x_BTD, self.final_norm_D)

    def _encode_to_keep(self, inputs: EncoderInputs, bias_B1S: Tensor) -> Tensor:
        """What the encoder gives, for keys and values that stay in a cache; zero on padding, where `bias_B1S` is made
        -inf.
        """
        encoded_BSD, documents_BS = self.encode(inputs)
        S = encoded_BSD.size(1)
        bias_B1S.fill_(-torch.inf)
        bias_B1S[:, :, :S] = 0.0
        if documents_BS is None:
            return encoded_BSD
        padding_BS = documents_BS < 0
        # A row of padding alone sees zeros: no weights could be made of scores that are all -inf.
        bias_B1S[:, 0, :S].masked_fill_(padding_BS & ~padding_BS.all(1, keepdim=True), -torch.inf)
        return encoded_BSD.masked_fill(padding_BS[..., None], 0.0)

    @torch.no_grad()
    def packed(self) -> Decoder:
        """A copy for generation on x86 CPUs, which shares the parameters and holds each matrix once more, in the order
        that oneDNN's products want; elsewhere the model itself.

        Later changes of the parameters do not reach it. A model that ranks share stays as it is. With one row a product
        takes half as long as from the parameter, with 32 rows 0.8 (bfloat16) or 0.4 (float32) of its time.
        """
        if not can_pack(self.embedding_VD) or self.cuts or self.hooked:
            return self
        with torch.device("meta"):
            twin = Decoder(self.config)
        twin.load_state_dict(self.state_dict(), assign=True)
        twin.requires_grad_(False).eval()
        twin.blocked_attention, twin.reading = self.blocked_attention, self.reading
        for block in twin.all_blocks:
            matrices = {name: each for name, each in block.named_parameters(recurse=False) if each.dim() > 1}
            block.packed = {name: pack(each.view(-1, each.size(-1))) for name, each in matrices.items()}
        twin.packed_head = pack(twin.head_VD)
        return twin

    @torch.no_grad()
    def activation_scales(self, tokens_BT: Tensor, **arguments: Tensor | EncoderInputs | None) -> dict[str, float]:
        """Root mean square of the embedding's, each block's and the last norm's output on these tokens; `arguments` as
        for `hidden_states`.
        """
        scales = {"embedding": _scale(F.embedding(tokens_BT, self.embedding_VD))}
        hooks = []
        for name, module in self.named_modules():
            if isinstance(module, Block):

                def note(_: nn.Module, __: object, output: tuple[Tensor, object], name: str = name) -> None:
                    scales[name] = _scale(output[0])

                hooks.append(module.register_forward_hook(note))
        compiled = [(block, block._compiled_call_impl) for block in self.all_blocks]
        try:
            for block in self.all_blocks:
                block._compiled_call_impl = None
            with torch.enable_grad():  # so that blocks are called, hooks and all
                scales["final"] = _scale(self.hidden_states(tokens_BT, **arguments))  # ty: ignore
        finally:
            for block, call in compiled:
                block._compiled_call_impl = call
            for hook in hooks:
                hook.remove()
        return scales

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (..., V) of `hidden_states`' result, float32, softcap applied."""
        if self.packed_head is not None:
            logits = packed_linear(hidden_BTD, self.packed_head)
        else:
            logits = F.linear(hidden_BTD, self.head_VD)
        return cap(logits.float(), self.config.softcap)

    def loss(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        scale: Tensor,
        z_loss: float,
        **reading: Tensor | EncoderInputs | None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy and z-loss times `scale` (nats; see `chunked_cross_entropy`); `reading` as for
        `hidden_states`.
        """
        self.records.clear()
        hidden_BTD = self.hidden_states(inputs_BT, **reading)  # ty: ignore
        hidden_ND = self._own_tokens(copy_to(hidden_BTD.flatten(0, 1), self.tensor))
        loss, z_term = chunked_cross_entropy(
            hidden_ND, copy_to(self.head_VD, self.tensor),
            self._own_tokens(targets_BT.flatten()), self._own_tokens(weights_BT.flatten()),
            scale=scale, softcap=self.config.softcap, z_loss=z_loss, compiled=self.compiled,
        )  # fmt: skip
        if self.tensor is not None:
            loss, z_term = reduce_from(torch.stack((loss, z_term)), self.tensor).unbind()
        return loss, z_term

    def _own_tokens(self, x: Tensor) -> Tensor:
        """This rank's share (equal, padded with zeros) of tokens (N, ...) whose states all ranks have."""
        if self.tensor is None:
            return x
        share = -(-len(x) // self.tensor.size)
        beyond = share * self.tensor.size - len(x)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, beyond)).narrow(0, self.tensor.rank * share, share)

    def auxiliary_loss(self) -> Tensor:
        """Balance and router z-loss of the last pass of `loss`, a mean over the layers of experts (nats); the rows' is
        the sum over ranks that share their positions.
        """
        return torch.stack([record.loss for record in self.records]).mean()

    @torch.no_grad()
    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor, **reading: Tensor | EncoderInputs | None) -> Tensor:
        """Cross-entropy of every target in nats, float32 (B, T); `reading` as for `hidden_states`."""
        hidden_BTD = self.hidden_states(inputs_BT, **reading)  # ty: ignore
        hidden_ND, targets_N = self._own_tokens(hidden_BTD.flatten(0, 1)), self._own_tokens(targets_BT.flatten())
        losses_N = token_losses(hidden_ND, self.head_VD, targets_N, self.config.softcap)
        if self.tensor is not None:
            losses_N = gather_over(losses_N, self.tensor, 0)[: targets_BT.numel()]
        return losses_N.view(targets_BT.shape)

    def new_cache(self, batch: int, capacity: int, encoded: int = 0) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` positions, in the model's dtype; `encoded` is how many
        states the encoder may give.
        """
        derived, like = self.derived, self.embedding_VD

        def empty(positions: int) -> list[Tensor]:
            size = (batch, self.all_blocks[-1].kv_heads, positions, derived.head_width)
            return [torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(self.config.layers)]

        if self.encoder is None:
            return Cache(empty(capacity), empty(capacity), [], [])
        bias_B1S = torch.full((batch, 1, encoded), -torch.inf, device=like.device)
        return Cache(empty(capacity), empty(capacity), empty(encoded), empty(encoded), bias_B1S)


def _scale(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())
