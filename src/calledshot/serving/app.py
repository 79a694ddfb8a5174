"""The HTTP interface: OpenAI's completions and chat completions over one engine."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from calledshot.serving import asked, body
from calledshot.serving.asked import Asked
from calledshot.serving.call import CLIENT_CLOSED_REQUEST, Call, Served, Streamed, answer
from calledshot.serving.errors import ApiError
from calledshot.serving.forms import ChatForm, Form, PlainForm

DRAINED_BODIES = 16
"""A body so many times too large is still read to its end, so that the caller hears why it was refused."""


def application(served: Served) -> Starlette:
    """The ASGI application. The engine stays the caller's to close."""
    api = Api(served)
    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.guarded(api.models)),
            Route("/v1/models/{name:path}", api.guarded(api.model)),
            Route("/v1/completions", api.guarded(api.completions), methods=["POST"]),
            Route("/v1/chat/completions", api.guarded(api.chat_completions), methods=["POST"]),
        ],
        exception_handlers={HTTPException: no_such_place, Exception: own_fault},
    )


def refuse(error: ApiError) -> Response:
    """An error as an answer."""
    return answer(error.body(), error.status, error.headers)


async def no_such_place(request: HttpRequest, error: Exception) -> Response:
    """Wrong paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
    return refuse(ApiError(error.status_code, message, code="not_found", headers=dict(error.headers or {})))


async def own_fault(request: HttpRequest, error: Exception) -> Response:
    """What nobody foresaw; its details go to the log alone."""
    del request, error
    return refuse(ApiError(500, "the server failed; its log says how", kind="server_error"))


class Api:
    """The endpoints."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.started = int(time.time())

    def guarded(
        self, endpoint: Callable[[HttpRequest], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """The endpoint behind the key, with its errors as answers."""

        async def guarded_endpoint(request: HttpRequest) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except ApiError as error:
                return refuse(error)
            except ClientDisconnect:  # in the middle of its body
                return Response(status_code=CLIENT_CLOSED_REQUEST)

        return guarded_endpoint

    def _check_key(self, request: HttpRequest) -> None:
        if not self.served.api_key:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.served.api_key.encode()):
            raise ApiError(
                401, "a wrong API key, or none", code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )

    async def health(self, request: HttpRequest) -> Response:
        """Whether it runs, and how busy it is."""
        del request
        engine = self.served.engine
        return answer(
            {
                "status": "ok",
                "model": self.served.name,
                "rows": engine.rows,
                "running": engine.running,
                "waiting": engine.waiting,
            }
        )

    async def models(self, request: HttpRequest) -> Response:
        """The one model."""
        del request
        return answer({"object": "list", "data": [self._card()]})

    async def model(self, request: HttpRequest) -> Response:
        """One model by its name."""
        self._check_model(request.path_params["name"])
        return answer(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.started,
            "owned_by": "calledshot",
            "context": self.served.context,
            "base_model": self.served.template == "plain",
        }

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            message = f"there is no model {name[:100]!r} here; this server has {self.served.name!r}"
            raise ApiError(404, message, parameter="model", code="model_not_found")

    async def completions(self, request: HttpRequest) -> Response:
        """Plain completions."""
        return await self._complete(request, PlainForm(self.served.name), self._asked_completion)

    async def chat_completions(self, request: HttpRequest) -> Response:
        """The assistant's next turn."""
        return await self._complete(request, ChatForm(self.served.name), self._asked_conversation)

    def _asked_completion(self, content: bytes) -> Asked:
        fields = body.parse(content)
        self._check_model(fields.text("model"))
        return asked.completion(fields, self.served.tokenizer, self.served.limits)

    def _asked_conversation(self, content: bytes) -> Asked:
        fields = body.parse(content)
        self._check_model(fields.text("model"))
        served = self.served
        return asked.conversation(fields, served.tokenizer, served.context, served.limits, served.template)

    async def _complete(self, request: HttpRequest, form: Form, read: Callable[[bytes], Asked]) -> Response:
        call = Call(self.served, await run_in_threadpool(read, await self._body(request)), form)
        if call.asked.stream:
            return Streamed(call)
        return await call.whole(request)

    async def _body(self, request: HttpRequest) -> bytes:
        most = self.served.limits.body_bytes
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > DRAINED_BODIES * most:
                break
            if size <= most:
                parts.append(part)
        if size > most:
            raise ApiError(413, f"the body has more than {most:,} bytes", code="body_too_large")
        return b"".join(parts)
