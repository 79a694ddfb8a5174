"""Who sees whom, proved by gradients and against a softmax written out from the rule in words."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from trunks import config, encoder_row, random_model, row

from calledshot.model import Decoder, EncoderInputs, attention
from calledshot.model.attention import Mask, attend, ready
from calledshot.model.positions import relative_bias

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def compiler():
    """A compiler that remembers nothing, before and after: a block may be compiled only so many times in a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


PATHS = ("blocked", "sdpa", "sdpa in parts")
KINDS = ("causal", "packed", "prefix", "packed prefix", "open", "packed encoder", "cross", "packed cross")
PARTS = ("packed part", "packed prefix part")
"""Queries that are the second half of a row."""


def regions_of(T: int) -> Tensor:
    """A prefix, another right after it, causal tokens, and then some more of the first: (1, T)."""
    regions_1T = torch.zeros(1, T, dtype=torch.int8)
    regions_1T[0, : T // 4] = 1
    regions_1T[0, T // 4 : T // 3] = 2
    regions_1T[0, T // 2 : 5 * T // 8] = 1
    return regions_1T


def mask_of(kind: str, T: int) -> Mask:
    """One row; where documents are packed their ends fall between those of row blocks and regions, padding behind."""
    if kind in PARTS:
        whole = mask_of(kind.removesuffix(" part"), 2 * T)
        assert whole.documents_BT is not None
        keys = {"key_documents_BS": whole.documents_BT, "key_regions_BS": whole.regions_BT}
        regions = None if whole.regions_BT is None else whole.regions_BT[:, T:]
        return Mask(T, 2 * T, documents_BT=whole.documents_BT[:, T:], regions_BT=regions, first=T, **keys)
    documents_1T = row(T // 6, 1, 2 * T // 3, width=T)[0] if "packed" in kind else None
    S = 3 * T // 4 if "cross" in kind else T
    # The second document of the decoder has no counterpart, and neither has padding.
    keys_1S = torch.tensor([[0] * (S // 3) + [2] * (S - S // 3)]) if kind == "packed cross" else None
    return Mask(
        T, S, ordered=kind not in ("open", "packed encoder", "cross", "packed cross"), documents_BT=documents_1T,
        key_documents_BS=keys_1S, regions_BT=regions_of(T) if "prefix" in kind else None,
    )  # fmt: skip


def rule_in_words(mask: Mask) -> Tensor:
    """The mask's docstring, key by key: (T, S)."""
    documents = None if mask.documents_BT is None else mask.documents_BT[0].tolist()
    keys = documents if mask.key_documents_BS is None else mask.key_documents_BS[0].tolist()
    regions = None if mask.regions_BT is None else mask.regions_BT[0].tolist()
    key_regions = regions if mask.key_regions_BS is None else mask.key_regions_BS[0].tolist()

    def sees(t: int, s: int) -> bool:
        same_region = regions is not None and regions[t] > 0 and regions[t] == key_regions[s]
        in_time = not mask.ordered or s <= mask.first + t or same_region
        return in_time and (documents is None or keys is None or documents[t] == keys[s])

    return torch.tensor([[sees(t, s) for s in range(mask.keys)] for t in range(mask.queries)])


def take(path: str, monkeypatch: pytest.MonkeyPatch, mask: Mask) -> bool:
    """Set up a path; whether it is the blocked one."""
    if path == "sdpa in parts":
        monkeypatch.setattr(attention, "MASK_ENTRIES", 40 * mask.keys)
    return path == "blocked"


def heads(mask: Mask, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values of 6 query heads over 2, and a table of T5's bias; for one row."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (1, mask.queries, 2, 3, 8), (1, mask.keys, 2, 8), (1, mask.keys, 2, 8), (6, 32)
    q, k, v, table = (torch.randn(size, generator=generator).requires_grad_() for size in sizes)
    return q, k, v, table


def softmax_written_out(q: Tensor, k: Tensor, v: Tensor, seen_TS: Tensor, bias_HTS: Tensor | None) -> Tensor:
    """In float64; what sees nothing gives zero."""
    scores = torch.einsum("btkgc,bskc->bkgts", q.double(), k.double()) / math.sqrt(q.size(-1))
    if bias_HTS is not None:
        scores = scores + bias_HTS.double().unflatten(0, (2, 3))
    weights = scores.masked_fill(~seen_TS, -torch.inf).softmax(-1).masked_fill(~seen_TS, 0.0)
    return torch.einsum("bkgts,bskc->btkgc", weights, v.double())


@pytest.mark.parametrize("kind", KINDS + PARTS)
def test_the_mask_is_its_rule_in_words(kind):
    mask = mask_of(kind, 24)
    assert torch.equal(mask.allowed(0, mask.queries, mask.keys)[0], rule_in_words(mask))
    assert torch.equal(mask.allowed(5, 17, 15)[0], rule_in_words(mask)[5:17, :15])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kind, biased",
    [(kind, biased) for kind in KINDS + PARTS for biased in (False, True) if not (biased and "cross" in kind)],
)
@pytest.mark.parametrize("T", [96, 256])
def test_each_path_is_a_softmax_over_what_is_seen(T, kind, biased, path, monkeypatch):
    """Values and gradients, of T5's table too; 256 positions are four blocks of rows, 96 are one."""
    mask = mask_of(kind, T)
    inputs = heads(mask)[: 4 if biased else 3]
    table_HR = inputs[3] if biased else None
    blocked = take(path, monkeypatch, mask)
    found = attend(*inputs[:3], ready(mask, CPU, torch.float32, blocked=blocked, table_HR=table_HR))
    bias_HTS = (
        None
        if table_HR is None
        else relative_bias(table_HR, mask.first, mask.first + T, mask.keys, ordered=mask.ordered)
    )
    expected = softmax_written_out(*inputs[:3], rule_in_words(mask), bias_HTS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = (
        torch.autograd.grad((found * slope).sum(), inputs),
        torch.autograd.grad((expected * slope).sum(), inputs),
    )
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS + PARTS)
def test_flex_attention_has_the_same_rule(kind):
    mask = mask_of(kind, 24)
    found = create_mask(mask.rule(), 1, None, mask.queries, mask.keys, device="cpu")
    assert torch.equal(found[0, 0], rule_in_words(mask))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["packed", "prefix", "packed prefix", "packed encoder", "packed cross", *PARTS])
@torch.no_grad()
def test_flex_attention_gives_the_same(kind, biased):
    """The forward alone: on CPUs it has no backward. What is plainly causal or open never takes it."""
    mask = mask_of(kind, 96)
    q, k, v, table_HR = (each.detach() for each in heads(mask))
    plain = ready(mask, CPU, torch.float32, blocked=False, table_HR=table_HR if biased else None)
    flex = attention.Seen(mask, block_mask=mask.block_mask(), head_biases=plain.head_biases)
    torch.testing.assert_close(attend(q, k, v, flex), attend(q, k, v, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["blocked", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobian_of_attention_is_zero_exactly_where_nothing_is_seen(kind, path, monkeypatch):
    """128 queries are two blocks of rows."""
    mask = mask_of(kind, 128)
    q, k, v, _ = heads(mask)
    y = attend(q, k, v, ready(mask, CPU, torch.float32, blocked=take(path, monkeypatch, mask)))
    seen_TS = rule_in_words(mask)
    for t in range(128):
        of_k, of_v = torch.autograd.grad(y[0, t].sum(), (k, v), retain_graph=True)
        assert torch.equal((of_v[0] != 0).any(-1).any(-1), seen_TS[t]), t
        # With a single key the weight is 1 whatever the key is.
        assert torch.equal((of_k[0] != 0).any(-1).any(-1), seen_TS[t] & (seen_TS[t].sum() > 1)), t


def reach(states_TD: Tensor, decoder: Decoder) -> Tensor:
    """Whether a state depends on a token id's embedding: (T, V)."""
    slope_D = torch.randn(states_TD.size(1), generator=torch.Generator().manual_seed(2))
    rows = [torch.autograd.grad(state_D @ slope_D, decoder.embedding_VD, retain_graph=True)[0] for state_D in states_TD]
    return torch.stack([(row_VD != 0).any(-1) for row_VD in rows])


def prepare(decoder: Decoder, path: str, monkeypatch: pytest.MonkeyPatch, T: int) -> None:
    decoder.blocked_attention = path in ("blocked", "compiled")
    if path == "sdpa in parts":
        monkeypatch.setattr(attention, "MASK_ENTRIES", 40 * T)
    if path == "compiled":
        for block in decoder.all_blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize(
    "path, kind",
    [
        *(("blocked", kind) for kind in ("causal", "packed", "prefix", "packed prefix")),
        *((path, "packed prefix") for path in ("sdpa", "sdpa in parts", "compiled")),
    ],
)  # fmt: skip
def test_one_layer_sees_what_the_mask_says(path, kind, monkeypatch):
    """Each position has a token of its own, so that gradients of the embedding are gradients of positions."""
    T = 128
    decoder = random_model(config(layers=1, vocabulary=T + 5))
    prepare(decoder, path, monkeypatch, T)
    mask = mask_of(kind, T)
    tokens_1T = torch.arange(T)[None]
    hidden_1TD = decoder.hidden_states(tokens_1T, None, mask.documents_BT, regions_BT=mask.regions_BT)
    found_TV = reach(hidden_1TD[0], decoder)
    assert torch.equal(found_TV[:, :T], rule_in_words(mask)) and not found_TV[:, T:].any()


@pytest.mark.parametrize(
    "path, packed",
    [("blocked", False), ("blocked", True), ("sdpa", False), ("sdpa in parts", True), ("compiled", True)],
)
def test_one_layer_of_an_encoder_sees_its_whole_document(path, packed, monkeypatch):
    S = 128
    decoder = random_model(config("encoder-decoder", layers=1, vocabulary=S))
    prepare(decoder, path, monkeypatch, S)
    documents_1S = row(30, 50, 1, width=S)[0] if packed else None
    states_1SD, _ = decoder.encode(EncoderInputs(torch.arange(S)[None], None, documents_1S))
    same = torch.ones(S, S) if documents_1S is None else documents_1S[0, :, None] == documents_1S
    assert torch.equal(reach(states_1SD[0], decoder), same.bool())


def closure(*layers: Tensor) -> Tensor:
    """Whom one sees through these layers, the first one first: each (T, S), or (T, T) with the stream beside it."""
    seen = torch.eye(layers[0].size(1))
    for layer_TS in layers:
        stream = torch.eye(len(layer_TS)) if layer_TS.size(0) == layer_TS.size(1) else 0
        seen = ((layer_TS.float() + stream) @ seen > 0).float()
    return seen.bool()


@pytest.mark.parametrize("path", ["blocked", "sdpa"])
@pytest.mark.parametrize("kind", ["prefix", "packed prefix"])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_stack_sees_the_closure_of_its_masks(layers, kind, path, monkeypatch):
    """The region goes on after causal tokens, which its first tokens see at second hand."""
    T = 32
    decoder = random_model(config("prefix", layers=layers, vocabulary=T))
    prepare(decoder, path, monkeypatch, T)
    mask = mask_of(kind, T)
    once = rule_in_words(mask)
    hidden_1TD = decoder.hidden_states(torch.arange(T)[None], None, mask.documents_BT, regions_BT=mask.regions_BT)
    twice = closure(*[once] * layers)
    assert not torch.equal(once, twice)
    assert torch.equal(reach(hidden_1TD[0], decoder), twice)


@pytest.mark.parametrize(
    "path, pooling", [*((path, pooling) for path in PATHS for pooling in (1, 2, 4)), ("compiled", 1)]
)
def test_a_decoder_sees_the_inputs_of_its_own_documents(path, pooling, monkeypatch):
    """Two rows, three documents in the first, of which the second has no inputs; no row sees into the other."""
    T, S = 16, 24
    decoder = random_model(config("encoder-decoder", encoder_pooling=pooling, encoder_layers=3, vocabulary=2 * (T + S)))
    prepare(decoder, path, monkeypatch, T)
    documents_BT = torch.cat([row(5, 3, 6, width=T)[0], row(16, width=T)[0]])
    encoded_BS = torch.cat([torch.tensor([[0] * 8 + [2] * 12 + [-1] * 4]), row(21, width=S)[0]])
    tokens_BT = torch.arange(2 * T).view(2, T)
    inputs = EncoderInputs(torch.arange(2 * T, 2 * (T + S)).view(2, S), None, encoded_BS)
    hidden_BTD = decoder.hidden_states(tokens_BT, None, documents_BT, encoder_inputs=inputs)
    assert hidden_BTD.isfinite().all()
    found = reach(hidden_BTD.flatten(0, 1), decoder)
    for b in range(2):
        same_TT = documents_BT[b, :, None] == documents_BT[b]
        expected_TT = same_TT & torch.ones(T, T, dtype=torch.bool).tril()
        same_TS = documents_BT[b, :, None] == encoded_BS[b]
        mine = found[b * T : (b + 1) * T]
        real_T = documents_BT[b] >= 0
        own = slice(b * T, (b + 1) * T), slice(2 * T + b * S, 2 * T + (b + 1) * S)
        assert torch.equal(mine[:, own[0]][real_T], expected_TT[real_T])
        assert torch.equal(mine[:, own[1]][real_T], same_TS[real_T])
        mine[:, own[0]] = mine[:, own[1]] = False
        assert not mine.any()


def test_pooled_neighbours_are_those_of_the_same_document():
    """Between layers the encoder's tokens become half as many: the closure of both layers' masks and the pairs."""
    S = 10
    model = config("encoder-decoder", layers=2, encoder_pooling=2, encoder_layers=2, vocabulary=S)
    decoder = random_model(model)
    inputs = encoder_row(torch.arange(S)[None], 3, 5)
    states_1SD, documents_1S = decoder.encode(inputs)
    assert documents_1S is not None and inputs.documents_BS is not None
    # The first document's third token has no partner in it: the place beside it belongs to the second document.
    assert documents_1S.tolist() == [[0, 0, 1, 1, -1]]
    documents = inputs.documents_BS[0]
    pairs = torch.zeros(S // 2, S)
    for pair in range(S // 2):
        for token in (2 * pair, 2 * pair + 1):
            pairs[pair, token] = documents[token] == documents[2 * pair]
    first = documents[:, None] == documents
    second = documents_1S[0, :, None] == documents_1S[0]
    assert torch.equal(reach(states_1SD[0], decoder), closure(first, pairs, second))
