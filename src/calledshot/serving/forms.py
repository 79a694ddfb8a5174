"""How each endpoint writes its answers: whole, and as the objects of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from calledshot.serving.choices import Choice, Recorded


class Form:
    """How an endpoint writes its answers."""

    kind, streamed_kind, prefix = "", "", ""

    def __init__(self, model: str) -> None:
        self._frame = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def frame(self, choices: list[dict[str, Any]], streamed: bool = True) -> dict[str, Any]:
        """The object around choices."""
        return {**self._frame, "object": self.streamed_kind if streamed else self.kind, "choices": choices}

    def whole(self, collected: list[tuple[Choice, str, list[Recorded]]], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        choices = [self.choice(*each) | {"finish_reason": each[0].finish} for each in collected]
        return self.frame(choices, streamed=False) | {"usage": usage}

    def choice(self, choice: Choice, text: str, recorded: list[Recorded]) -> dict[str, Any]:
        """One choice of a whole answer."""
        raise NotImplementedError

    def opening(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """Objects before the first text."""
        del choices
        return []

    def parts(self, choice: Choice, text: str, recorded: list[Recorded]) -> list[dict[str, Any]]:
        """Objects for a piece of text, and for the end if it is the last."""
        raise NotImplementedError


class PlainForm(Form):
    """`/v1/completions`."""

    kind, streamed_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, choice: Choice, text: str, recorded: list[Recorded]) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": choice.completion_logprobs(recorded)}

    def parts(self, choice: Choice, text: str, recorded: list[Recorded]) -> list[dict[str, Any]]:
        return [self.frame([self.choice(choice, text, recorded) | {"finish_reason": choice.finish or None}])]


class ChatForm(Form):
    """`/v1/chat/completions`."""

    kind, streamed_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, choice: Choice, text: str, recorded: list[Recorded]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": choice.index, "message": message, "logprobs": choice.chat_logprobs(recorded)}

    def opening(self, choices: list[Choice]) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self.frame([self._delta(choice.index, delta)]) for choice in choices]

    def parts(self, choice: Choice, text: str, recorded: list[Recorded]) -> list[dict[str, Any]]:
        out = []
        if text or recorded:
            out.append(
                self.frame([self._delta(choice.index, {"content": text}, choice.chat_logprobs(recorded))]),
            )
        if choice.finish:
            out.append(self.frame([self._delta(choice.index, {}) | {"finish_reason": choice.finish}]))
        return out

    def _delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
