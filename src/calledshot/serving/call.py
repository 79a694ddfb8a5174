"""One call: handed to the engine, and answered whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from calledshot.data import Tokenizer
from calledshot.model import Engine, Overloaded
from calledshot.recipe import UsageError
from calledshot.serving import chat
from calledshot.serving.asked import Asked, Limits
from calledshot.serving.choices import Choice, Recorded
from calledshot.serving.errors import ApiError
from calledshot.serving.forms import ChatForm, Form

CLIENT_CLOSED_REQUEST = 499
"""Nobody is there to read it."""


@dataclass(frozen=True)
class Served:
    """A model as it is offered."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    context: int
    template: chat.Template = "plain"
    limits: Limits = field(default_factory=Limits)
    api_key: str = ""
    """What callers must send as their bearer token; empty asks for none."""


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, in ASCII, so that any string of the caller's can be quoted back."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


class Call:
    """One call while it is answered."""

    def __init__(self, served: Served, wanted: Asked, form: Form) -> None:
        """Hands the work to the engine; ApiError when that does not take it."""
        self._engine, self.asked, self.form = served.engine, wanted, form
        self._moved = asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone when the server has been forced to stop
                loop.call_soon_threadsafe(self._moved.set)

        try:
            self._completions = served.engine.submit(wanted.requests(), notify)
        except UsageError as error:
            parameter = "messages" if isinstance(form, ChatForm) else "prompt"
            code = "context_length_exceeded" if "context" in str(error) else None
            raise ApiError(400, str(error), parameter=parameter, code=code) from None
        except Overloaded:
            message = "too many requests are waiting; try again in a moment"
            headers = {"retry-after": "1"}
            raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers) from None
        self.choices = [
            Choice(index, completion, wanted.prompts[index // wanted.choices], wanted, served.tokenizer)
            for index, completion in enumerate(self._completions)
        ]

    async def pieces(self) -> AsyncIterator[tuple[Choice, str, list[Recorded]]]:
        """News of any choice, until all are complete. ApiError where one came to nothing."""
        open_choices = list(self.choices)
        while open_choices:
            await self._moved.wait()
            self._moved.clear()
            for choice in open_choices:
                text, recorded = choice.advance()
                if choice.finish == "failed":
                    raise ApiError(500, f"generation failed: {choice.completion.error}", kind="server_error")
                if choice.finish == "cancelled":
                    raise ApiError(503, "the server is stopping", kind="server_error")
                if choice.finish:
                    self._engine.cancel([choice.completion])  # after a stop string it would go on
                if text or recorded or choice.finish:
                    yield choice, text, recorded
            open_choices = [choice for choice in open_choices if not choice.finish]

    def end(self) -> None:
        """Whatever still runs has nobody who waits for it."""
        self._engine.cancel(self._completions)

    def usage(self) -> dict[str, int]:
        """Tokens of each prompt once, and of all its completions."""
        prompts = sum(len(prompt.tokens) for prompt in self.asked.prompts)
        made = sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made}

    async def whole(self, request: HttpRequest) -> Response:
        """All of it in one answer, unless the caller leaves before."""
        collected = asyncio.create_task(self._collect())
        gone = asyncio.create_task(until_gone(request))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return answer(self.form.whole(collected.result(), self.usage()))
        finally:
            collected.cancel()
            gone.cancel()
            self.end()

    async def _collect(self) -> list[tuple[Choice, str, list[Recorded]]]:
        texts: list[str] = [""] * len(self.choices)
        records: list[list[Recorded]] = [[] for _ in self.choices]
        async for choice, text, recorded in self.pieces():
            texts[choice.index] += text
            records[choice.index] += recorded
        return list(zip(self.choices, texts, records, strict=True))

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, down to the last."""
        usage = {"usage": None} if self.asked.include_usage else {}
        try:
            for opening in self.form.opening(self.choices):
                yield event(opening | usage)
            async for choice, text, recorded in self.pieces():
                for part in self.form.parts(choice, text, recorded):
                    yield event(part | usage)
            if self.asked.include_usage:
                yield event(self.form.frame([]) | {"usage": self.usage()})
        except ApiError as error:
            yield event(error.body())
            return
        yield "data: [DONE]\n\n"


async def until_gone(request: HttpRequest) -> None:
    """Returns when the caller has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


class Streamed(StreamingResponse):
    """A call's events; the work ends with the connection."""

    def __init__(self, call: Call) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(call.events(), headers=headers, media_type="text/event-stream")
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end()
