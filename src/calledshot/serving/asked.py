"""What a caller asks for: bodies of `/v1/completions` and `/v1/chat/completions`, checked and tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from calledshot.data import Tokenizer
from calledshot.data.tokenizer import well_formed
from calledshot.model import Request, Sampling
from calledshot.serving import chat
from calledshot.serving.body import Body, wrong

MOST_STOPS = 16
MOST_ALTERNATIVES = 20
SEED_RANGE = 2**63
SAYS_NOTHING = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    body_bytes: int = 1 << 20
    completions: int = 64
    """Of one call: prompts times `n`."""
    tokens: int = 0
    """New tokens a completion; 0 leaves it to the model's context."""


@dataclass(frozen=True)
class Prompt:
    """What a completion goes on from."""

    tokens: tuple[int, ...]
    text: str = ""
    """As `echo` returns it."""
    begins: bool = True
    """Whether the first token is a begin token that the caller has not written."""


@dataclass(frozen=True)
class Asked:
    """One call."""

    prompts: list[Prompt]
    choices: int
    """Completions of each prompt."""
    tokens: int
    sampling: Sampling
    stop: list[str]
    stop_tokens: frozenset[int]
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool

    def requests(self) -> list[Request]:
        """One for each choice, in the order of their indices."""
        return [
            Request(
                prompt.tokens,
                self.tokens,
                Sampling(**{**vars(self.sampling), "stream": stream}),
                self.stop_tokens,
                self.logprobs,
                prompt_logprobs=self.echo and self.logprobs is not None,
            )
            for prompt in self.prompts
            for stream in range(self.choices)
        ]


def completion(body: Body, tokenizer: Tokenizer, limits: Limits) -> Asked:
    """A body of `/v1/completions`."""
    echo = body.flag("echo")
    prompts = [_prompt(one, tokenizer) for one in _prompts(body.value("prompt"))]
    logprobs = body.integer("logprobs", -1, 0, MOST_ALTERNATIVES)
    best_of = body.integer("best_of", 0, 1)
    body.neutral("suffix", "")
    if best_of not in (0, body.integer("n", 1, 1)):
        wrong("best_of", "is only taken where it equals n", code="unsupported_parameter")
    tokens = _tokens(body, ("max_tokens",), min(16, limits.tokens or 16), limits)
    return _asked(
        body, prompts, tokens, limits,
        stop_tokens=frozenset({tokenizer.end}), logprobs=None if logprobs < 0 else logprobs, echo=echo,
    )  # fmt: skip


def conversation(body: Body, tokenizer: Tokenizer, context: int, limits: Limits, template: chat.Template) -> Asked:
    """A body of `/v1/chat/completions`. Without a bound on tokens the answer may fill the context."""
    ids = chat.prompt(tokenizer, _messages(body.value("messages")), template)
    logprobs = body.flag("logprobs")
    alternatives = body.integer("top_logprobs", 0, 0, MOST_ALTERNATIVES)
    if alternatives and not logprobs:
        wrong("top_logprobs", "needs logprobs: true")
    for name, value in (("tools", []), ("functions", []), ("tool_choice", "none"), ("modalities", ["text"])):
        body.neutral(name, value)
    body.neutral("response_format", {"type": "text"})
    body.neutral("parallel_tool_calls", True, False)
    tokens = _tokens(body, ("max_completion_tokens", "max_tokens"), limits.tokens or context, limits)
    return _asked(
        body, [Prompt(ids)], tokens, limits,
        stop_tokens=chat.stop_tokens(tokenizer, template), logprobs=alternatives if logprobs else None, echo=False,
    )  # fmt: skip


def _asked(body: Body, prompts: list[Prompt], tokens: int, limits: Limits, **rest: Any) -> Asked:
    choices = body.integer("n", 1, 1)
    if choices * len(prompts) > limits.completions:
        wrong("n", f"times {len(prompts)} prompts makes more than the {limits.completions} completions of one call")
    seed = body.integer("seed", SEED_RANGE, -SEED_RANGE, SEED_RANGE - 1)
    sampling = Sampling(
        temperature=body.number("temperature", 1.0, 0, 2),
        top_p=body.number("top_p", 1.0, 0, 1) or 1e-6,
        top_k=max(0, body.integer("top_k", 0, -1)),
        min_p=body.number("min_p", 0.0, 0, 1),
        seed=None if seed == SEED_RANGE else seed,
    )
    body.neutral("presence_penalty", 0)
    body.neutral("frequency_penalty", 0)
    body.neutral("logit_bias", {})
    stop = body.strings("stop", MOST_STOPS)
    stream, include_usage = body.flag("stream"), False
    options = body.value("stream_options")
    if options is not None:
        if not stream or not isinstance(options, dict):
            wrong("stream_options", "is an object, and needs stream: true")
        include_usage = Body(options).flag("include_usage")
    body.ignore(*SAYS_NOTHING)
    body.done()
    return Asked(prompts, choices, tokens, sampling, stop, stream=stream, include_usage=include_usage, **rest)


def _tokens(body: Body, names: Sequence[str], default: int, limits: Limits) -> int:
    asked = [(name, body.integer(name, -1, 0)) for name in names]
    name, tokens = next(((name, tokens) for name, tokens in asked if tokens >= 0), (names[0], default))
    if limits.tokens and tokens > limits.tokens:
        wrong(name, f"is {tokens:,}; this server makes up to {limits.tokens:,} tokens a completion")
    return tokens


def _prompts(value: Any) -> list[str | list[int]]:
    """A string, token ids, or a list of either."""
    if value is None:
        return [""]
    if isinstance(value, str) or _ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or _ids(one) for one in value):
        return value
    wrong("prompt", "must be a string, a list of token ids, or a list of either, and not empty")


def _ids(value: Any) -> bool:
    numbers = isinstance(value, list) and value
    return bool(numbers) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _prompt(given: str | list[int], tokenizer: Tokenizer) -> Prompt:
    if isinstance(given, str):
        text = well_formed(given)
        return Prompt((tokenizer.begin, *tokenizer.encode(text)), text)
    # Ids out of range are the engine's to refuse; the text is only looked at once it has taken them.
    return Prompt(tuple(given), tokenizer.decode(one for one in given if one >= 0), begins=False)


def _messages(value: Any) -> list[chat.Message]:
    if not isinstance(value, list) or not value:
        wrong("messages", "must be a list of messages, and not empty")
    return [_message(one, f"messages[{place}]") for place, one in enumerate(value)]


def _message(value: Any, name: str) -> chat.Message:
    if not isinstance(value, dict):
        wrong(name, "must be an object with role and content")
    role = {"developer": "system"}.get(value.get("role"), value.get("role")) if _text(value.get("role")) else None
    if role not in get_args(chat.Role):
        wrong(f"{name}.role", "must be system, developer, user or assistant")
    content = value.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) and part.get("type") == "text" and _text(part.get("text")) for part in parts):
        wrong(f"{name}.content", "must be a string or a list of text parts")
    return chat.Message(role, "".join(part["text"] for part in parts))


def _text(value: Any) -> bool:
    return isinstance(value, str)
