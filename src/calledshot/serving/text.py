"""Text of a completion while it grows."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from calledshot.data import Tokenizer

REPLACEMENT = "\ufffd".encode()
CODE_POINT_BYTES = 4
"""Longest UTF-8 form, so the most tokens that one character can be spread over."""


class TextStream:
    """Tokens in, text out: whole code points only, and nothing of a stop string nor after it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        """`before` are tokens that stand in front: some vocabularies spell a token by what it follows."""
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._context, self._pending = list(before[-CODE_POINT_BYTES:]), list[int]()
        self._held = ""
        self._decoded = 0
        self.stopped = False
        """Whether a stop string has been met: the text is complete."""
        self.length = 0
        """Characters given out."""
        self.offsets: list[int] = []
        """Where in the text each token begins."""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is certain after these tokens, beyond what was given out before."""
        out = []
        for token in tokens:
            if self.stopped:
                break
            self.offsets.append(self._decoded)
            self._pending.append(token)
            out.append(self._release(self._decode(final=False), final=False))
        return "".join(out)

    def finish(self) -> str:
        """What was held back, at the end of the tokens; bytes that are no UTF-8 become U+FFFD."""
        return "" if self.stopped else self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        before = len(self._tokenizer.decode_bytes(self._context))
        spelled = self._tokenizer.decode_bytes(self._context + self._pending)[before:]
        # Vocabularies that are not byte-level spell a part of a character as U+FFFD.
        if spelled.endswith(REPLACEMENT) and len(self._pending) < CODE_POINT_BYTES and not final:
            return ""
        if self._pending:
            self._context, self._pending = self._pending, []
        text = self._decoder.decode(spelled, final)
        self._decoded += len(text)
        return text

    def _release(self, text: str, final: bool) -> str:
        self._held += text
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else self._possible_stop()
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.length += len(out)
        return out

    def _possible_stop(self) -> int:
        """Characters at the end with which a stop string may begin."""
        longest = min(len(self._held), max(map(len, self._stop), default=0))
        return next((size for size in range(longest, 0, -1) if self._begins_stop(self._held[-size:])), 0)

    def _begins_stop(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stop)
