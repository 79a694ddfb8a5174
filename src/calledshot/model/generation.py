"""Completions: prompts of any lengths read together, then one token a step for each, through one cache.

Shapes: B rows, T longest prompt, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from calledshot.model.decoder import Decoder, Reading
from calledshot.model.encoder import EncoderInputs
from calledshot.model.sampling import Sampling, choose
from calledshot.recipe import UsageError

CAPACITY_STEP = 64
"""Positions by which a cache grows. Attention reads all of it, contiguous: a length of its own each step would cost a
CPU about 1 ms for new bfloat16 kernels, and a part of a longer cache several times the product's time."""
PROMPT_TOKENS = 4096
"""Tokens of prompts read in one pass, padding included, unless one alone is longer."""
LOGITS_ROWS = 256
"""Positions of a prompt whose logits stand in memory together."""


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted after it."""

    prompt: tuple[int, ...]
    """Token ids, the begin token included; at least one."""
    tokens: int
    """Most new tokens; the model's context may end it sooner."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    """Token ids that end the completion and are no part of it."""
    logprobs: int | None = None
    """Record each token's log-probability and so many of the likeliest alternatives; None records nothing."""
    prompt_logprobs: bool = False
    """The same for the prompt's tokens."""
    reading: Reading | None = None
    """How the prompt is put to the model; None as the model says."""


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token under the model itself (temperature 1, nothing cut off), in nats."""

    value: float
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs, best first."""


@dataclass(eq=False)
class Completion:
    """What has come of a request so far. Lists only grow; `finish` is set after the last token is in them."""

    request: Request
    given: int = 0
    """Ids that the decoder was given before the first of `tokens`."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    """One a token, where the request asked for them."""
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)
    """One a token of the prompt, None for its first."""
    finish: Literal["", "stop", "length", "cancelled", "failed"] = ""
    """Why it ended: a stop token, the tokens asked for or the context's end, its owner's will, an error; empty while it
    runs."""
    error: Exception | None = None
    room: int = field(init=False, default=0)
    uniforms: random.Random = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.uniforms = random.Random(None if sampling.seed is None else f"{sampling.seed}/{sampling.stream}")

    @property
    def position(self) -> int:
        """Where the newest token stands: what is before it is in the cache."""
        return self.given + len(self.tokens) - 1


class Decoding:
    """Completions in the making. Rows of the cache are the `active` ones in order; they come and go between steps."""

    def __init__(self, model: Decoder, vocabulary: int = 0, banned: Collection[int] = ()) -> None:
        """`vocabulary` is the tokenizer's size: rows of the head past it stand for nothing and are never drawn. Nor are
        the ids in `banned` (`banned_tokens`), unless a request stops at them; log-probabilities are as without."""
        self.model = model
        self.context = model.config.context
        self.vocabulary = vocabulary or model.derived.vocabulary
        self.banned = frozenset(token for token in banned if token < self.vocabulary)
        self._banned = torch.tensor(sorted(self.banned), dtype=torch.int64, device=model.embedding_VD.device)
        self.active: list[Completion] = []
        with torch.inference_mode():
            self._cache = model.new_cache(1, CAPACITY_STEP)

    def check(self, request: Request) -> None:
        """Raise UsageError for a prompt that this model cannot read."""
        if not request.prompt:
            raise UsageError("the prompt has no tokens; it takes the begin token at least")
        read, given, _ = self._put(request)
        longest = self.model.derived.encoder_context if self.model.encoder is not None else self.context
        if max(len(read), len(given)) > longest:
            around = max(len(read), len(given)) - len(request.prompt)
            raise UsageError(
                f"the prompt has {len(request.prompt):,} tokens{f', {around} put around it' if around else ''}, more "
                f"than the model's context of {longest:,}; shorten it"
            )
        if request.prompt_logprobs and (read or self._reading(request).two_way):
            raise UsageError("a prompt that is read both ways has no log-probabilities; ask for the completion's alone")
        wrong = next((token for token in request.prompt if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise UsageError(f"the prompt's token {wrong} is not in the vocabulary of {self.vocabulary:,}")

    def _reading(self, request: Request) -> Reading:
        return self.model.reading if request.reading is None else request.reading

    def _put(self, request: Request) -> tuple[list[int], list[int], int]:
        """What the encoder reads, what the decoder is given, and how many of these see each other both ways."""
        reading = self._reading(request)
        inputs = [*reading.before, *request.prompt, *reading.after]
        if self.model.encoder is not None:
            return inputs, list(reading.start), 0
        return [], [*inputs, *reading.start], len(inputs) if reading.two_way else 0

    @torch.inference_mode()
    def add(self, completions: Iterable[Completion]) -> None:
        """Read the prompts of new completions, all checked, and draw the first token of each."""
        group: list[Completion] = []
        for completion in sorted(completions, key=lambda each: len(each.request.prompt)):
            if group and (len(group) + 1) * len(completion.request.prompt) > PROMPT_TOKENS:
                self._read(group)
                group = []
            group.append(completion)
        if group:
            self._read(group)

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for each active completion."""
        rows = len(self.active)
        self._fit(rows, max(each.position for each in self.active) + 1)
        device = self.model.embedding_VD.device
        tokens_B1 = torch.tensor([each.tokens[-1:] for each in self.active], device=device)
        positions_B1 = torch.tensor([[each.position] for each in self.active], device=device)
        cache = self._cache.part(slice(rows), self._cache.capacity)
        hidden_B1D = self.model.hidden_states(tokens_B1, positions_B1, cache=cache)
        self._extend(self.active, self.model.logits(hidden_B1D[:, 0]))
        self._sweep()

    @torch.inference_mode()
    def drop(self, completion: Completion) -> None:
        """Take an active completion out, unfinished."""
        row, last = self.active.index(completion), len(self.active) - 1
        if row != last:
            self._cache.part(slice(row, row + 1), self._cache.capacity).copy_from(
                self._cache.part(slice(last, last + 1), self._cache.capacity)
            )
            self.active[row] = self.active[last]
        self.active.pop()

    def _read(self, group: list[Completion]) -> None:
        put = [self._put(each.request) for each in group]
        for each, (_, given, _) in zip(group, put, strict=True):
            each.given = len(given)
        longest, first = max(each.given for each in group), len(self.active)
        encoded = max(len(read) for read, _, _ in put)
        self._fit(
            first + len(group), max(longest, max((each.position for each in self.active), default=0)) + 1, encoded
        )
        device = self.model.embedding_VD.device
        # Padding stands behind: nothing before it sees it, and tokens to come overwrite it in the cache.
        tokens_BT = torch.tensor([[*given, *[0] * (longest - len(given))] for _, given, _ in put], device=device)
        regions_BT = encoder_inputs = None
        if any(both for _, _, both in put):
            both_B1 = torch.tensor([[both] for _, _, both in put], device=device)
            regions_BT = (torch.arange(longest, device=device) < both_B1).to(torch.int8)
        if encoded:
            read_BS = torch.tensor([[*read, *[0] * (encoded - len(read))] for read, _, _ in put], device=device)
            lengths_B1 = torch.tensor([[len(read)] for read, _, _ in put], device=device)
            beyond_BS = torch.arange(encoded, device=device) >= lengths_B1
            encoder_inputs = EncoderInputs(read_BS, documents_BS=-beyond_BS.int())
        cache = self._cache.part(slice(first, first + len(group)), self._cache.capacity)
        hidden_BTD = self.model.hidden_states(
            tokens_BT, cache=cache, regions_BT=regions_BT, encoder_inputs=encoder_inputs
        )
        for row, each in enumerate(group):
            each.room = min(each.request.tokens, self.context - each.given)
            if each.request.prompt_logprobs:
                before = len(self._reading(each.request).before)
                each.prompt_logprobs += self._prompt_logprobs(each.request, hidden_BTD[row, before:])
        last_B = torch.tensor([each.given - 1 for each in group], device=device)
        rows_B = torch.arange(len(group), device=device)
        self.active += group
        self._extend(group, self.model.logits(hidden_BTD[rows_B, last_B]))
        self._sweep()

    def _extend(self, completions: Sequence[Completion], logits_BV: Tensor) -> None:
        logits_BV = logits_BV[:, : self.vocabulary]
        rules = [each.request.sampling for each in completions]
        uniforms = [0.0 if each.request.sampling.greedy else each.uniforms.random() for each in completions]
        chosen = choose(self._allowed(completions, logits_BV), rules, uniforms).tolist()
        recorded = self._logprobs(completions, logits_BV, chosen)
        for row, (each, token) in enumerate(zip(completions, chosen, strict=True)):
            if each.room and token in each.request.stop:
                each.finish = "stop"
                continue
            if each.room:
                if row in recorded:
                    each.logprobs.append(recorded[row])
                each.tokens.append(token)
            if len(each.tokens) == each.room:
                each.finish = "length"

    def _allowed(self, completions: Sequence[Completion], logits_BV: Tensor) -> Tensor:
        """The logits without what is banned."""
        if not self.banned:
            return logits_BV
        allowed_BV = logits_BV.index_fill(1, self._banned, -math.inf)
        for row, each in enumerate(completions):
            for token in each.request.stop & self.banned:
                allowed_BV[row, token] = logits_BV[row, token]
        return allowed_BV

    def _logprobs(self, completions: Sequence[Completion], logits_BV: Tensor, chosen: list[int]) -> dict[int, Logprob]:
        rows = [row for row, each in enumerate(completions) if each.request.logprobs is not None]
        if not rows:
            return {}
        most = max(completions[row].request.logprobs or 0 for row in rows)
        found = logprobs(logits_BV[rows], [chosen[row] for row in rows], most)
        return {
            row: Logprob(one.value, one.top[: completions[row].request.logprobs])
            for row, one in zip(rows, found, strict=True)
        }

    def _prompt_logprobs(self, request: Request, hidden_TD: Tensor) -> list[Logprob | None]:
        found: list[Logprob | None] = [None]
        targets = request.prompt[1:]
        for start in range(0, len(targets), LOGITS_ROWS):
            part = targets[start : start + LOGITS_ROWS]
            logits = self.model.logits(hidden_TD[start : start + len(part)])[:, : self.vocabulary]
            found += logprobs(logits, part, request.logprobs or 0)
        return found

    def _sweep(self) -> None:
        for completion in [each for each in self.active if each.finish]:
            self.drop(completion)

    def _fit(self, rows: int, positions: int, encoded: int = 0) -> None:
        """Make the cache hold so much, and let go of most of what it no longer needs."""
        capacity = -(-positions // CAPACITY_STEP) * CAPACITY_STEP
        cache = self._cache
        across = max(cache.encoded, -(-encoded // CAPACITY_STEP) * CAPACITY_STEP)
        fits = rows <= cache.rows <= 4 * rows and capacity <= cache.capacity <= 2 * capacity
        if fits and across == cache.encoded:
            return
        rows = cache.rows if rows <= cache.rows <= 4 * rows else 1 << (rows - 1).bit_length()
        self._cache = self.model.new_cache(rows, capacity, across)
        self._cache.copy_from(cache)


def logprobs(logits_BV: Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """Log-probability of each row's token, with the `top` likeliest."""
    scores_BV = logits_BV.log_softmax(-1)
    values = scores_BV.gather(1, torch.tensor(tokens, device=logits_BV.device)[:, None])[:, 0].tolist()
    best = scores_BV.topk(min(top, scores_BV.size(1)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Logprob(value, tuple(zip(*pair, strict=True))) for value, pair in zip(values, pairs, strict=True)]


def steps(decoding: Decoding, completions: Iterable[Completion], rows: int = 32) -> Iterator[None]:
    """Work off completions, at most `rows` at a time, and pause after each token of theirs."""
    waiting = deque(completions)
    while waiting or decoding.active:
        decoding.add([waiting.popleft() for _ in range(min(len(waiting), rows - len(decoding.active)))])
        yield
        if decoding.active:
            decoding.step()
            yield


def generate(
    model: Decoder, requests: Sequence[Request], *, vocabulary: int = 0, banned: Collection[int] = (), rows: int = 32
) -> list[Completion]:
    """Complete all requests, at most `rows` at a time. UsageError, before any work, for a prompt that is too long."""
    decoding = Decoding(model, vocabulary, banned)
    for request in requests:
        decoding.check(request)
    completions = [Completion(request) for request in requests]
    for _ in steps(decoding, completions, rows):
        pass
    return completions
