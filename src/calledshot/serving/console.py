"""Completions and conversations at a terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from calledshot.data import Tokenizer
from calledshot.model import Completion, Decoder, Decoding, Request, Sampling, steps
from calledshot.recipe import UsageError
from calledshot.serving import chat
from calledshot.serving.text import TextStream


@dataclass
class Written:
    """A completion as text."""

    text: str = ""
    tokens: int = 0
    finish: str = ""


def write(
    model: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    stop: Sequence[str] = (),
    show: Callable[[int, str], None] = lambda number, text: None,
    banned: Collection[int] = (),
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Written]:
    """Complete requests together, without the tokens in `banned`, until `interrupted`. `show` gets each one's text
    piece by piece, with its number, as it comes."""
    if "" in stop:
        raise UsageError("--stop '': an empty text would end everything before it begins")
    decoding = Decoding(model, tokenizer.size, banned)
    for request in requests:
        decoding.check(request)
    completions = [Completion(request) for request in requests]
    streams = [TextStream(tokenizer, stop, request.prompt[-4:]) for request in requests]
    written = [Written() for _ in requests]
    for _ in steps(decoding, completions):
        if interrupted():
            break
        for number, (one, completion, stream) in enumerate(zip(written, completions, streams, strict=True)):
            if one.finish:
                continue
            text = stream.push(completion.tokens[one.tokens :])
            one.tokens, one.finish = len(completion.tokens), completion.finish
            if stream.stopped:
                one.finish = "stop"
                if completion in decoding.active:
                    decoding.drop(completion)
            elif one.finish:
                text += stream.finish()
            one.text += text
            if text:
                show(number, text)
    return written


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed in here; a second one is a KeyboardInterrupt. The exception alone would not do:
    one that comes while Python cleans up an object is lost, and the answer goes on."""
    pressed = threading.Event()

    def note(number: int, frame: object) -> None:
        del number, frame
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Conversation:
    """Turns so far, and how the next one is made."""

    model: Decoder
    tokenizer: Tokenizer
    template: chat.Template
    tokens: int
    """Most tokens of an answer."""
    sampling: Sampling
    stop: Sequence[str] = ()
    banned: Collection[int] = ()
    """Tokens that are never written."""
    messages: list[chat.Message] = field(default_factory=list)
    answers: int = 0

    def say(self, text: str, show: Callable[[str], None]) -> int:
        """Take a turn of the user's and answer it, piece by piece to `show`; Ctrl-C ends the answer early.

        Gives the number of old messages that had to be forgotten. UsageError, with nothing changed, when the text alone
        does not fit the context.
        """
        context = self.model.config.context
        messages = [*self.messages, chat.Message("user", text)]
        prompt = chat.prompt(self.tokenizer, messages, self.template)
        forgotten = 0
        while len(prompt) > context - min(self.tokens, context // 2) and len(messages) > 1:
            del messages[0]
            forgotten += 1
            prompt = chat.prompt(self.tokenizer, messages, self.template)
        if len(prompt) >= context:
            raise UsageError(f"that is {len(prompt):,} tokens, and the model's context has {context:,}; shorten it")
        # Every answer draws random numbers of its own, also under a seed.
        sampling = replace(self.sampling, stream=self.answers)
        request = Request(prompt, self.tokens, sampling, chat.stop_tokens(self.tokenizer, self.template))
        answer = list[str]()

        def keep(number: int, piece: str) -> None:
            del number
            answer.append(piece)
            show(piece)

        with contextlib.suppress(KeyboardInterrupt), interruptible() as interrupted:
            write(self.model, self.tokenizer, [request], self.stop, keep, self.banned, interrupted)
        self.messages = [*messages, chat.Message("assistant", "".join(answer))]
        self.answers += 1
        return forgotten

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []


def converse(
    conversation: Conversation, lines: Iterator[str], show: Callable[[str], None], tell: Callable[[str], None]
) -> None:
    """Answer line by line until they end or `/quit`. Answers go to `show`, everything else to `tell`."""
    for line in lines:
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/reset":
            conversation.reset()
            tell("forgotten; a new conversation")
        elif line.startswith("/") and line[1:].isalpha():
            tell(f"{line.strip()}: there are /reset and /quit")
        elif line.strip():
            try:
                forgotten = conversation.say(line, show)
            except UsageError as error:
                tell(str(error))
                continue
            show("\n")
            if forgotten:
                tell(f"(the context is full: the {forgotten} oldest messages are forgotten)")
