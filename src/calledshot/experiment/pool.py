"""Commands side by side, safely interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    command: tuple[str, ...]
    log: Path
    """What it says is appended here."""
    output: Path | None = None
    """Where its stdout goes instead."""


class Pool:
    """Runs commands, so many at a time. The first Ctrl-C or SIGTERM is handed on to each, and nothing new is started;
    the second is handed on too. Each has a process group of its own, so that a terminal's Ctrl-C reaches it once."""

    def __init__(self, slots: int, devices: Sequence[str] = ()) -> None:
        """`devices` are values of CUDA_VISIBLE_DEVICES, one a slot; without any the variable is left alone."""
        self.slots, self.devices = slots, devices
        self.signal: int | None = None
        self._active: dict[int, tuple[subprocess.Popen[bytes], Job, float]] = {}
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 without either."""
        return 128 + self.signal if self.signal is not None else 0

    def __enter__(self) -> Pool:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._hand_on(signal.SIGINT)  # to what an error in here would leave alone
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            os.write(2, b"shot: the runs finish their step and save; once more stops them at once\n")
        self._hand_on(number)

    def _hand_on(self, number: int) -> None:
        for process, _, _ in self._active.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def work(self, jobs: Iterable[Job], ended: Callable[[Job, int, float], None]) -> None:
        """Runs the jobs in order and tells `ended` of each its exit code (negative: the signal that killed it) and
        seconds. Returns when all have ended, or after a signal those that were running."""
        waiting, left = iter(jobs), True
        while left or self._active:
            for slot in range(self.slots):
                left = left and self.signal is None
                if left and slot not in self._active:
                    job = next(waiting, None)
                    left = job is not None
                    if job is not None:
                        self._active[slot] = (self._start(job, slot), job, time.monotonic())
                        if self.signal is not None:  # it came while the process was being made
                            self._hand_on(self.signal)
            for slot, (process, job, began) in list(self._active.items()):
                if process.poll() is not None:
                    del self._active[slot]
                    ended(job, process.returncode, time.monotonic() - began)
            time.sleep(POLL_SECONDS if self._active else 0)

    def _start(self, job: Job, slot: int) -> subprocess.Popen[bytes]:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        with job.log.open("ab") as log, (job.output or Path(os.devnull)).open("wb") as output:
            return subprocess.Popen(
                job.command, stdin=subprocess.DEVNULL, stdout=output if job.output else log, stderr=log,
                start_new_session=True, env=environment,
            )  # fmt: skip
