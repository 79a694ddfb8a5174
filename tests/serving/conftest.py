"""A real server on a loopback port, over a tiny model with random weights and a tokenizer trained on a few lines."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import openai
import pytest
import torch

from calledshot.data import Tokenizer
from calledshot.model import Decoder, Engine
from calledshot.recipe import schema
from calledshot.serving import Served, listen, url
from calledshot.serving.server import Server

CONTEXT = 100_000
"""Longer than any test waits for, so that what ends early was ended."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = ["def read(path):\n    return open(path).read()\n" * 20, "naïve café, 日本語 and 👍🏽 " * 20]
    return Tokenizer.train(texts, 600)


@pytest.fixture(scope="session")
def decoder(tokenizer: Tokenizer) -> Decoder:
    config = schema.Model(
        layers=2, width=32, heads=4, kv_heads=2, vocabulary=-(-tokenizer.size // 64) * 64, context=CONTEXT
    )
    decoder = Decoder(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.size(-1) ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0)
    decoder.head_VD[tokenizer.end] = 0  # some other token is always likelier, so that greedy answers never end
    return decoder


class Running:
    """A server in this process, with clients for it."""

    def __init__(self, served: Served, address: str, server: Server) -> None:
        self.served, self.address, self.server = served, address, server
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key=served.api_key or "none", max_retries=0)

    def settle(self, seconds: float = 5.0) -> bool:
        """Whether nothing runs or waits, in the end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.served.engine.running == self.served.engine.waiting == 0:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="session")
def start(decoder: Decoder, tokenizer: Tokenizer) -> Callable:
    @contextmanager
    def run(*, rows: int = 16, waiting: int = 64, **options) -> Iterator[Running]:
        engine = Engine(decoder, rows=rows, waiting=waiting, vocabulary=tokenizer.size, banned=tokenizer.reserved)
        served = Served(engine, tokenizer, "tiny", CONTEXT, **options)
        listener, ready = listen("127.0.0.1", 0), threading.Event()
        server = Server(served, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert ready.wait(10)
            yield Running(served, url(listener), server)
        finally:
            engine.close()
            server.should_exit = True
            thread.join(10)
            listener.close()

    return run


@pytest.fixture(scope="session")
def server(start: Callable) -> Iterator[Running]:
    with start() as running:
        yield running
