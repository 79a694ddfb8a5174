"""Completions for many askers at once: one thread steps the model, and requests join and leave between its steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence

from calledshot.model.decoder import Decoder
from calledshot.model.generation import Completion, Decoding, Request

log = logging.getLogger(__name__)


class Overloaded(Exception):
    """Too many requests wait already; ask again later."""


class Engine:
    """Owns a model and the thread that runs it. Its methods may be called from any thread."""

    def __init__(
        self, model: Decoder, *, rows: int = 16, waiting: int = 64, vocabulary: int = 0, banned: Collection[int] = ()
    ) -> None:
        """Up to `rows` completions run together, each in a row of the cache, and `waiting` more wait in line;
        `vocabulary` and `banned` as for `Decoding`."""
        self.rows, self.most_waiting = rows, waiting
        self._decoding = Decoding(model.packed(), vocabulary, banned)
        self._waiting: deque[Completion] = deque()
        self._notify: dict[Completion, Callable[[], None]] = {}
        self._cancelled: set[Completion] = set()
        self._changed = threading.Condition()
        self._closing = False
        self.widest = 0
        """Most completions that one step has advanced together."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Completions that each step advances."""
        return len(self._decoding.active)

    @property
    def waiting(self) -> int:
        """Completions in line."""
        return len(self._waiting)

    def submit(self, requests: Sequence[Request], notify: Callable[[], None]) -> list[Completion]:
        """Take in all of these, or none. After each step that moved one of them `notify` is called, in the engine's
        thread, and must return at once; what has come so far is in the completions.

        UsageError for a prompt that the model cannot read; Overloaded when the line is full.
        """
        for request in requests:
            self._decoding.check(request)
        completions = [Completion(request) for request in requests]
        with self._changed:
            free = max(0, self.rows - self.running)
            if self._closing or len(self._waiting) + len(completions) > self.most_waiting + free:
                raise Overloaded
            self._waiting += completions
            self._notify |= dict.fromkeys(completions, notify)
            self._changed.notify()
        return completions

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Give up on completions, whatever their state; a row is free again after the step in progress."""
        with self._changed:
            self._cancelled.update(each for each in completions if not each.finish)
            self._changed.notify()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._decoding.active or self._closing)
                if self._closing:
                    self._cancelled.update(self._waiting, self._decoding.active)
                self._leave()
                if self._closing:
                    return
                free = self.rows - len(self._decoding.active)
                joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            moved = [*self._decoding.active, *joining]
            try:
                if joining:
                    self._decoding.add(joining)
                if self._decoding.active:
                    self.widest = max(self.widest, len(self._decoding.active))
                    self._decoding.step()
            except Exception as error:  # out of memory, say: their askers are told, and the next ones served
                log.exception("a step failed")
                self._decoding = Decoding(self._decoding.model, self._decoding.vocabulary, self._decoding.banned)
                for each in moved:
                    each.error, each.finish = error, each.finish or "failed"
            self._tell(moved)

    def _leave(self) -> None:
        """Take out what was cancelled."""
        for each in self._cancelled:
            if each in self._waiting:
                self._waiting.remove(each)
            if each in self._decoding.active:
                self._decoding.drop(each)
            each.finish = each.finish or "cancelled"
        self._tell(list(self._cancelled))
        self._cancelled.clear()

    def _tell(self, completions: Sequence[Completion]) -> None:
        called = set()
        for each in completions:
            notify = self._notify.pop(each, None) if each.finish else self._notify[each]
            if notify is not None and notify not in called:
                called.add(notify)
                notify()
