"""The server process: a port, a URL, and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

import uvicorn

from calledshot.recipe import RunError, UsageError
from calledshot.serving.app import Served, application

log = logging.getLogger("uvicorn.error")

PATIENCE = 10
"""Seconds that answers in progress get once the server was asked to stop."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. RunError when it is taken, UsageError when it is none."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port}: ports go from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(
            f"--host {host}: {error.strerror}; 127.0.0.1 is this machine alone, 0.0.0.0 all networks"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} of {host} is taken; give another with --port, or --port 0 for a free one"
            ) from None
        raise RunError(f"port {port} of {host}: {error.strerror}; give another with --port or --host") from None
    return listener


def url(listener: socket.socket) -> str:
    """Where to reach it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn that says when it takes requests, and ends answers that take too long with an error in their own form."""

    def __init__(self, served: Served, ready: Callable[[], None]) -> None:
        options = {"log_level": "warning", "access_log": False, "lifespan": "off"}
        super().__init__(uvicorn.Config(application(served), timeout_graceful_shutdown=PATIENCE + 5, **options))
        self._engine, self._ready = served.engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        answers = self._engine.running + self._engine.waiting
        if answers:
            log.warning("%d answers are in progress and get %d s; Ctrl-C again stops at once", answers, PATIENCE)
        asyncio.get_running_loop().call_later(PATIENCE, self._engine.close)
        await super().shutdown(sockets)


def serve(served: Served, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until Ctrl-C or SIGTERM; `ready` is called once they are taken. A second signal does not wait for
    answers. The engine is closed with it.
    """
    try:
        Server(served, ready).run([listener])
    finally:
        served.engine.close()
        listener.close()
