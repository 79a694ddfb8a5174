"""Ctrl-C and SIGTERM: the first finishes the step and saves, the second stops now."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


class Stopped(Exception):
    """A stop was asked for, in work that keeps nothing or has kept what it did."""


class Stop:
    """Catches SIGINT and SIGTERM while entered. Long work asks `requested` between its pieces."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raises Stopped once a stop is asked for."""
        if self.requested:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 without either."""
        return 128 + self.signal if self.signal is not None else 0

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os.write(2, b"shot: stopped at once; `shot resume` goes on from the last checkpoint\n")
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"shot: finishing the step and saving; once more stops at once\n")

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        sys.stderr.flush()
