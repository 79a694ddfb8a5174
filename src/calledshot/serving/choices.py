"""A completion as the caller sees it: text, and log-probabilities in the two forms of the API."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from calledshot.data import Tokenizer
from calledshot.model import Completion, Logprob
from calledshot.serving.asked import Asked, Prompt
from calledshot.serving.text import TextStream

LOWEST = -9999.0
"""Stands for log-probabilities that JSON cannot carry, as in OpenAI's answers."""


@dataclass(frozen=True)
class Recorded:
    """A token with its log-probability (None for a prompt's first) and where it begins in the text."""

    token: int
    logprob: Logprob | None
    offset: int


class Choice:
    """One completion of a call, read piece by piece."""

    def __init__(self, index: int, completion: Completion, prompt: Prompt, asked: Asked, tokenizer: Tokenizer) -> None:
        self.index, self.prompt, self.completion = index, prompt, completion
        self._asked, self._tokenizer = asked, tokenizer
        self._text = TextStream(tokenizer, asked.stop, before=prompt.tokens[-4:])
        self._unsent: list[Recorded] = []
        self._echoing = asked.echo
        self.tokens = 0
        """Tokens made for this choice, up to the stop."""
        self.finish = ""
        """`stop` or `length` once it is complete; `cancelled` or `failed` where it came to nothing."""

    def advance(self) -> tuple[str, list[Recorded]]:
        """New text and what goes with it."""
        ended = self.completion.finish  # read first: all tokens are there once it is set
        new = self.completion.tokens[self.tokens :]
        shift = len(self.prompt.text) if self._asked.echo else 0
        text = ""
        for token in new:
            text += self._text.push([token])
            if self.completion.logprobs:
                logprob = self.completion.logprobs[self.tokens]
                self._unsent.append(Recorded(token, logprob, shift + self._text.offsets[-1]))
            self.tokens += 1
            if self._text.stopped:
                self.finish = "stop"
                break
        else:
            if ended:
                text += self._text.finish()
                self.finish = ended
        if self._echoing:
            text = self.prompt.text + text
            self._unsent = self._prompt_recorded() + self._unsent
            self._echoing = False
        return text, self._release(shift)

    def _release(self, shift: int) -> list[Recorded]:
        """What begins in the text given out; the rest waits with its text, or goes with it after a stop string."""
        end = shift + self._text.length
        out = [one for one in self._unsent if one.offset < end or (self.finish and not self._text.stopped)]
        self._unsent = [] if self.finish else self._unsent[len(out) :]
        return out

    def _prompt_recorded(self) -> list[Recorded]:
        if self._asked.logprobs is None:
            return []
        skip = int(self.prompt.begins)
        tokens, found = self.prompt.tokens[skip:], self.completion.prompt_logprobs[skip:]
        text = TextStream(self._tokenizer)
        text.push(tokens)
        return [Recorded(*each) for each in zip(tokens, found, text.offsets, strict=True)]

    def completion_logprobs(self, recorded: list[Recorded]) -> dict[str, Any] | None:
        """As `/v1/completions` has them."""
        if self._asked.logprobs is None:
            return None
        return {
            "tokens": [self._name(one.token) for one in recorded],
            "token_logprobs": [one.logprob and finite(one.logprob.value) for one in recorded],
            "top_logprobs": [one.logprob and self._alternatives(one.token, one.logprob) for one in recorded],
            "text_offset": [one.offset for one in recorded],
        }

    def chat_logprobs(self, recorded: list[Recorded]) -> dict[str, Any] | None:
        """As `/v1/chat/completions` has them."""
        if self._asked.logprobs is None:
            return None
        content = []
        for one in recorded:
            assert one.logprob is not None
            top = [self._spelled(token, value) for token, value in one.logprob.top]
            content.append(self._spelled(one.token, one.logprob.value) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _alternatives(self, token: int, logprob: Logprob) -> dict[str, float]:
        """The likeliest tokens, and the one taken."""
        found = {self._name(other): finite(value) for other, value in reversed(logprob.top)}
        return found | {self._name(token): finite(logprob.value)}

    def _spelled(self, token: int, value: float) -> dict[str, Any]:
        spelling = self._tokenizer.decode_bytes([token])
        return {"token": self._name(token), "logprob": finite(value), "bytes": list(spelling)}

    def _name(self, token: int) -> str:
        """Its text, or its bytes where these are no text by themselves."""
        spelling = self._tokenizer.decode_bytes([token])
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def finite(value: float) -> float:
    """A number that JSON can carry."""
    return max(value, LOWEST) if math.isfinite(value) else LOWEST
