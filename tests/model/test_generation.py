"""Generation: the cache changes nothing, neighbors change nothing, and draws follow their distribution."""

import math

import pytest
import torch

from calledshot.data.tokenizer import SMALLEST, Tokenizer
from calledshot.model import Decoder
from calledshot.model.generation import CAPACITY_STEP, Completion, Decoding, Request, generate
from calledshot.model.sampling import WINDOW, Sampling, banned_tokens, choose
from calledshot.recipe import UsageError, schema

SHAPES = {
    "grouped": schema.Model(layers=2, width=48, heads=6, kv_heads=2, vocabulary=97, context=200),
    "multi-query, tied, softcap": schema.Model(
        layers=2, width=32, heads=4, kv_heads=1, vocabulary=97, context=200, tied_embeddings=True, softcap=8.0
    ),
    "multi-head, no norm of queries": schema.Model(
        layers=2, width=32, heads=2, kv_heads=2, vocabulary=97, context=200, qk_norm=False
    ),
}


def random_decoder(config: schema.Model) -> Decoder:
    """Weights large enough that logits differ and attention matters."""
    decoder = Decoder(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 2 * parameter.size(-1) ** -0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return decoder


def prompts(lengths: list[int], vocabulary: int = 97) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist()) for length in lengths]


@torch.no_grad()
def without_cache(decoder: Decoder, request: Request) -> list[int]:
    """The plain definition: the whole sequence is read anew for every token."""
    completion, ids = Completion(request), list(request.prompt)
    for _ in range(request.tokens):
        logits = decoder.logits(decoder.hidden_states(torch.tensor([ids]))[:, -1])
        uniform = 0.0 if request.sampling.greedy else completion.uniforms.random()
        ids.append(int(choose(logits, [request.sampling], [uniform])))
    return ids[len(request.prompt) :]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, seed=1), Sampling(0.9, top_k=9, top_p=0.9, seed=2)])
def test_with_a_cache_and_neighbors_each_token_is_that_of_reading_all_anew(name, sampling):
    """Prompts of many lengths, padded together; more of them than rows; the cache grows on the way."""
    decoder = random_decoder(SHAPES[name])
    requests = [
        Request(prompt, tokens, sampling)
        for prompt, tokens in zip(prompts([1, 7, 30, CAPACITY_STEP - 2, 90, 2]), [40, 9, 50, 6, 30, 1], strict=True)
    ]
    completions = generate(decoder, requests, rows=4)
    assert [each.tokens for each in completions] == [without_cache(decoder, request) for request in requests]
    assert {each.finish for each in completions} == {"length"}


def test_rows_that_join_and_leave_between_steps_disturb_nobody():
    decoder = random_decoder(SHAPES["grouped"])
    requests = [
        Request(prompt, 30, Sampling(1.0, seed=seed)) for seed, prompt in enumerate(prompts([3, 80, 12, 5, 40]))
    ]
    alone = [generate(decoder, [request])[0].tokens for request in requests]
    decoding = Decoding(decoder)
    first, second, third, *others = [Completion(request) for request in requests]
    decoding.add([first, second])
    decoding.step()
    decoding.add([third])
    decoding.step()
    decoding.drop(second)  # the longest: the cache shrinks later
    decoding.add(others)
    while decoding.active:
        decoding.step()
    assert [each.tokens for each in (first, third, *others)] == [alone[0], *alone[2:]]
    assert second.tokens == alone[1][: len(second.tokens)] and not second.finish


def test_a_seed_and_a_stream_repeat_and_others_differ():
    decoder = random_decoder(SHAPES["grouped"])
    prompt = prompts([4])[0]

    def tokens(**rules) -> list[int]:
        return generate(decoder, [Request(prompt, 20, Sampling(1.0, **rules))])[0].tokens

    assert tokens(seed=1) == tokens(seed=1)
    assert len({tuple(tokens(seed=seed, stream=one)) for seed in (1, 2) for one in (0, 1)}) == 4
    assert tokens() != tokens()


def test_it_ends_at_a_stop_token_at_the_length_asked_for_and_at_the_context():
    decoder = random_decoder(SHAPES["grouped"])
    prompt = prompts([150])[0]
    whole = generate(decoder, [Request(prompt, 1000, Sampling(0))])[0]
    assert len(whole.tokens) == decoder.config.context - 150 and whole.finish == "length"
    assert generate(decoder, [Request(prompt, 5, Sampling(0))])[0].tokens == whole.tokens[:5]
    stop = whole.tokens[7]
    stopped = generate(decoder, [Request(prompt, 1000, Sampling(0), stop=frozenset({stop}))])[0]
    assert stopped.tokens == whole.tokens[: whole.tokens.index(stop)] and stopped.finish == "stop"
    full = generate(decoder, [Request(prompts([200])[0], 3, Sampling(0))])[0]
    assert full.tokens == [] and full.finish == "length"


@pytest.mark.parametrize(("prompt", "said"), [((1,) * 201, "201 tokens"), ((), "no tokens"), ((1, 97), "token 97")])
def test_a_prompt_that_cannot_be_read_is_refused_in_one_line(prompt, said):
    with pytest.raises(UsageError, match=said) as raised:
        generate(random_decoder(SHAPES["grouped"]), [Request(prompt, 1)])
    assert "\n" not in str(raised.value)


def test_rows_of_the_head_past_the_tokenizer_are_never_drawn():
    decoder = random_decoder(SHAPES["grouped"])
    decoder.head_VD[50:] += 100 * torch.sign(decoder.head_VD[50:])
    drawn = generate(decoder, [Request((1,), 150, Sampling(5.0, seed=0)), Request((1,), 9, Sampling(0))], vocabulary=50)
    assert max(max(each.tokens) for each in drawn) < 50


@pytest.mark.parametrize("rules", [{"temperature": 0.0}, {"temperature": 9.0}, {"temperature": 9.0, "top_k": 40}])
def test_banned_tokens_are_never_drawn_but_where_a_request_stops_at_them(rules):
    decoder = random_decoder(SHAPES["grouped"])
    likely = generate(decoder, [Request((1,), 40, Sampling(0))])[0].tokens
    banned = {*likely, *range(20)}
    sampling = Sampling(seed=0, **rules)
    asked = [Request((1,), 60, sampling, logprobs=2), Request((2,), 60, sampling, frozenset(range(20)))]
    free, stopping = generate(decoder, asked, banned=banned)
    assert len(free.tokens) == 60 and not banned & set(free.tokens)
    assert not banned & set(stopping.tokens)
    if rules["temperature"]:
        assert stopping.finish == "stop"
    # The model's own probabilities, of which the banned tokens have their share, are told all the same.
    assert free.logprobs[0].top[0][0] == likely[0]


def test_banned_are_all_special_tokens_but_the_end():
    tokenizer = Tokenizer.train(["a text"], SMALLEST)
    assert banned_tokens(tokenizer) == set(tokenizer.special.values()) - {tokenizer.end}


@torch.no_grad()
def test_log_probabilities_are_those_of_one_pass_over_prompt_and_completion():
    decoder = random_decoder(SHAPES["grouped"])
    prompt = prompts([70])[0]
    request = Request(prompt, 10, Sampling(0.7, seed=1), logprobs=3, prompt_logprobs=True)
    plain = Request(prompts([9])[0], 10, Sampling(0))
    completion, other = generate(decoder, [request, plain])
    ids = [*prompt, *completion.tokens]
    expected = decoder.logits(decoder.hidden_states(torch.tensor([ids])))[0, :-1].log_softmax(-1)
    recorded = [*completion.prompt_logprobs[1:], *completion.logprobs]
    assert completion.prompt_logprobs[0] is None and not other.logprobs
    values = expected.gather(1, torch.tensor(ids)[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([one.value for one in recorded]), values, rtol=1e-4, atol=1e-5)
    assert [[token for token, _ in one.top] for one in recorded] == expected.topk(3).indices.tolist()


def shares(logits: torch.Tensor, rule: Sampling, draws: int = 4000) -> torch.Tensor:
    """How often each token is drawn, by evenly spaced uniforms: an integral instead of a sample."""
    uniforms = [(number + 0.5) / draws for number in range(draws)]
    chosen = choose(logits.expand(draws, -1), [rule] * draws, uniforms)
    return torch.bincount(chosen, minlength=logits.size(0)) / draws


def test_shares_of_draws_are_the_softmax_s_and_the_truncations_are_their_definitions():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -math.inf])
    softmax = torch.softmax(logits, -1)

    def renormalized(kept: int, probabilities: torch.Tensor = softmax) -> torch.Tensor:
        cut = probabilities * (torch.arange(6) < kept)
        return cut / cut.sum()

    torch.testing.assert_close(shares(logits, Sampling(1.0)), softmax, atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(logits, Sampling(2.0)), torch.softmax(logits / 2, -1), atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(logits, Sampling(1.0, top_k=2)), renormalized(2), atol=1e-3, rtol=0)
    # 0.563 + 0.207 < 0.8 <= 0.563 + 0.207 + 0.126
    torch.testing.assert_close(shares(logits, Sampling(1.0, top_p=0.8)), renormalized(3), atol=1e-3, rtol=0)
    # exp(-1) = 0.368, exp(-1.5) = 0.223
    torch.testing.assert_close(shares(logits, Sampling(1.0, min_p=0.3)), renormalized(2), atol=1e-3, rtol=0)
    both = Sampling(1.0, top_k=4, top_p=0.8, min_p=0.1)
    torch.testing.assert_close(shares(logits, both), renormalized(3), atol=1e-3, rtol=0)


def test_a_distribution_wider_than_the_sorted_window_is_drawn_whole():
    V = 3 * WINDOW
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 0.1
    order = logits.argsort(descending=True)
    for rule, kept in ((Sampling(1.0, top_k=2 * WINDOW), 2 * WINDOW), (Sampling(1.0, min_p=1e-9), V)):
        found = shares(logits, rule, 40 * V)
        expected = torch.zeros(V).scatter(0, order[:kept], torch.softmax(logits[order[:kept]], -1))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        assert int((found > 0).sum()) == kept


def test_each_row_is_drawn_by_its_own_rule_whatever_stands_beside_it():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4 * WINDOW, generator=generator)
    endless = Sampling(1.0, top_k=10**400)  # more than a float holds: keeps all
    rules = [Sampling(0), endless, Sampling(0.5, top_p=0.99), Sampling(3.0, top_k=5), Sampling(1e-9), Sampling(0)]
    uniforms = torch.rand(6, generator=generator).tolist()
    alone = [int(choose(logits[row : row + 1], [rules[row]], [uniforms[row]])) for row in range(6)]
    assert choose(logits, rules, uniforms).tolist() == alone
    assert [alone[row] for row in (0, 4, 5)] == logits.argmax(-1)[[0, 4, 5]].tolist()


@pytest.mark.parametrize(
    "rules", [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}]
)
def test_rules_that_mean_nothing_are_refused(rules):
    with pytest.raises(UsageError, match=next(iter(rules))):
        Sampling(**rules)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_packed_matrices_give_the_same_logits_and_tokens_and_leave_the_model_as_it_was(name, dtype, tolerance):
    decoder = random_decoder(SHAPES[name]).to(dtype)
    packed = decoder.packed()
    assert packed is decoder or packed.embedding_VD.data_ptr() == decoder.embedding_VD.data_ptr()
    tokens = torch.tensor(prompts([40])[0]).view(4, 10)
    expected = decoder.logits(decoder.hidden_states(tokens))
    torch.testing.assert_close(packed.logits(packed.hidden_states(tokens)), expected, rtol=tolerance, atol=tolerance)
    assert all(block.packed is None for block in decoder.blocks) and decoder.packed_head is None
    if dtype == torch.float32:
        requests = [Request(prompt, 20, Sampling(1.0, seed=1)) for prompt in prompts([5, 30])]
        plain, fast = (generate(model, requests) for model in (decoder, packed))
        assert [each.tokens for each in plain] == [each.tokens for each in fast]


def test_what_is_trained_on_is_not_what_was_packed():
    """A packed copy is a picture of the parameters at that time."""
    decoder = random_decoder(SHAPES["grouped"])
    packed = decoder.packed()
    if packed is decoder:
        pytest.skip("matrices are not packed on this machine")
    before = packed.logits(packed.hidden_states(torch.tensor([[1, 2]])))
    decoder.blocks[0].out_DHC.mul_(3.0)
    after = packed.logits(packed.hidden_states(torch.tensor([[1, 2]])))
    assert torch.equal(before, after)
    assert not torch.allclose(after, decoder.logits(decoder.hidden_states(torch.tensor([[1, 2]]))), atol=1e-3)
