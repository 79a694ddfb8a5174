"""`shot generate`, `shot chat` and `shot serve`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from calledshot.cli.arguments import Json, print_json
from calledshot.recipe import UsageError, units

if TYPE_CHECKING:
    from calledshot.training import Loaded

KEY_VARIABLE = "CALLEDSHOT_API_KEY"

Run = Annotated[str, Parameter(help="Name or folder of a run, or RUN@STEP.")]
Tokens = Annotated[int, Parameter(help="Most new tokens; the model's context may end it sooner.")]
Temperature = Annotated[float, Parameter(help="Divides the logits; 0 takes the likeliest token each time.")]
TopK = Annotated[int, Parameter(help="Draw from so many of the likeliest tokens; 0 from all.")]
TopP = Annotated[float, Parameter(help="Draw from the likeliest tokens that hold so much of the probability.")]
MinP = Annotated[float, Parameter(help="Leave out tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, Parameter(help="The same seed gives the same text; without one it is drawn.")]
Stop = Annotated[tuple[str, ...], Parameter(help="Text before which it ends (repeatable).", negative=())]
Template = Annotated[
    Literal["plain", "turns"],
    Parameter(help="What messages become: plain text, for base models, or turns, for models trained on them."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], Parameter(help="Of the matmuls; auto takes what the run was trained in.")
]


def size(kind: type, tokens: Any) -> int:
    """Bytes, as `1MiB`."""
    del kind
    return units.bytes_(tokens[0].value)


def generate(
    run: Run,
    prompt: Annotated[str, Parameter(help="Text to go on from; - reads it from stdin.", allow_leading_hyphen=True)],
    /,
    *,
    tokens: Tokens = 128,
    count: Annotated[int, Parameter(name=("-n", "--count"), help="Completions.")] = 1,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = (),
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Complete a text. Only what is new is printed."""
    positive(tokens=tokens, count=count)
    text = standard_input() if prompt == "-" else prompt
    from calledshot.model import Request, Sampling, banned_tokens
    from calledshot.serving.console import write

    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    rules = [Sampling(temperature, top_k, top_p, min_p, seed, stream) for stream in range(count)]
    loaded = load(run, dtype)
    tokenizer = loaded.tokenizer
    ids = (tokenizer.begin, *tokenizer.encode(text))
    requests = [Request(ids, tokens, rule, frozenset({tokenizer.end})) for rule in rules]
    streamed = count == 1 and not json
    start = time.perf_counter()
    written = write(
        loaded.model.packed(), tokenizer, requests, stop, show if streamed else lambda number, text: None,
        banned=banned_tokens(tokenizer),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if json:
        made = sum(one.tokens for one in written)
        print_json(
            {
                "run": loaded.run.name,
                "step": loaded.step,
                "prompt": text,
                "prompt_tokens": len(ids),
                "seed": seed,
                "completions": [vars(one) for one in written],
                "seconds": seconds,
                "tokens_per_second": made / seconds,
            }
        )
    elif streamed:
        print()
    else:
        print("\n".join(f"--- {number} of {count}\n{one.text}" for number, one in enumerate(written, 1)))


def chat(
    run: Run,
    /,
    *,
    tokens: Tokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = (),
    template: Template = "plain",
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model. A base model was never taught to answer: it goes on with what you write.

    /reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer.
    """
    positive(tokens=tokens)
    from calledshot.model import Sampling, banned_tokens
    from calledshot.serving.console import Conversation, converse

    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    loaded = load(run, dtype)
    banned = banned_tokens(loaded.tokenizer)
    conversation = Conversation(loaded.model.packed(), loaded.tokenizer, template, tokens, sampling, stop, banned)
    tell(f"{loaded.run.name} at step {loaded.step:,}, context {loaded.model.config.context:,} tokens")
    if template == "plain":
        tell("This is a base model: it was never taught to answer, and goes on with what you write.")
    tell("/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer.")
    converse(conversation, typed_lines(), lambda text: show(0, text), tell)


def serve(
    run: Run,
    /,
    *,
    host: Annotated[str, Parameter(help="Address to listen on; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on; 0 takes a free one.")] = 8000,
    concurrent: Annotated[int, Parameter(help="Completions made together.")] = 16,
    waiting: Annotated[int, Parameter(help="Completions that may wait for their turn.")] = 64,
    tokens: Annotated[int, Parameter(help="Most new tokens of a completion; 0 leaves it to the context.")] = 0,
    body: Annotated[int, Parameter(help="Largest body of a request.", converter=size)] = 2**20,
    template: Template = "plain",
    dtype: Dtype = "auto",
) -> int:
    """Serve a model over HTTP, as OpenAI's API has it: /v1/models, /v1/completions, /v1/chat/completions.

    The URL is printed once it takes requests. Callers must send the key in CALLEDSHOT_API_KEY where that is set.
    Ctrl-C stops it, after the answers in progress.
    """
    positive(concurrent=concurrent, waiting=waiting, body=body)
    if tokens < 0:
        raise UsageError(f"--tokens {tokens}: must be 0 or more")
    from calledshot.serving.server import listen, serve, url

    with listen(host, port) as listener:
        from calledshot.model import Engine, banned_tokens
        from calledshot.serving import Limits, Served

        loaded = load(run, dtype)
        key = os.environ.get(KEY_VARIABLE, "")
        if not key and host not in ("127.0.0.1", "::1", "localhost"):
            tell(f"No key: whoever reaches {host} can use it. Set {KEY_VARIABLE} to ask for one.")
        if template == "plain":
            tell("This is a base model: the messages of a chat are joined as plain text, and it goes on with that.")
        engine = Engine(
            loaded.model, rows=concurrent, waiting=waiting,
            vocabulary=loaded.tokenizer.size, banned=banned_tokens(loaded.tokenizer),
        )  # fmt: skip
        name = f"{loaded.run.name}@{loaded.step}" if "@" in run else loaded.run.name
        limits = Limits(body, concurrent + waiting, tokens)
        context = loaded.model.config.context
        served = Served(engine, loaded.tokenizer, name, context, template, limits, key)

        def ready() -> None:
            print(f"{url(listener)}/v1", flush=True)
            tell(f"Serving {name}; Ctrl-C stops it.")

        with contextlib.suppress(KeyboardInterrupt):
            serve(served, listener, ready)
        tell("stopped")
    return 0


def load(run: str, dtype: str) -> Loaded:
    """The model of `RUN` or `RUN@STEP`, on the GPU if there is one."""
    import torch

    from calledshot import machine
    from calledshot.evals.evaluation import trained_dtype
    from calledshot.rundir import resolve_checkpoint
    from calledshot.training import load_model

    directory, step = resolve_checkpoint(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(min(torch.get_num_threads(), machine.usable_cores()))
    name = trained_dtype(directory, device) if dtype == "auto" else dtype
    return load_model(directory, step, dtype=getattr(torch, name), device=device)


def positive(**options: int) -> None:
    """UsageError for an option that must be more than 0."""
    for name, value in options.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: must be 1 or more")


def standard_input() -> str:
    """All of stdin. UsageError where it is no UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: not UTF-8 text (byte {error.start:,}); convert it first") from None


def typed_lines() -> Iterator[str]:
    """Lines of stdin, with a prompt and line editing on a terminal, until Ctrl-D; Ctrl-C drops what is typed."""
    prompt = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() edits lines with it)
        prompt = "> "
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError:
            tell("that was no UTF-8")


def show(number: int, text: str) -> None:
    """Text to stdout, at once."""
    del number
    print(text, end="", flush=True)


def tell(text: str) -> None:
    """A message to stderr."""
    print(text, file=sys.stderr, flush=True)
