"""Several processes of one job on this machine: `--ranks N`.

`torchrun` would end its processes at the first Ctrl-C, whatever they are saving, and answer 1 to everything; these are
told once, finish by themselves, and their exit code is handed on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import FrameType
from typing import IO

from calledshot.recipe import UsageError

GRACE_SECONDS = 15.0
"""Between one rank's end by a fault and that of the others, whose connections are gone then."""
POLL_SECONDS = 0.05
LAST_LINES = 3


def start(ranks: int) -> int:
    """Runs this very command in `ranks` processes; its exit code.

    The first rank speaks; of another that fails first the last lines are shown. Raises: UsageError inside a job that a
    launcher has started already, or for no ranks.
    """
    if ranks < 1:
        raise UsageError(f"--ranks {ranks}: must be 1 or more")
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            f"--ranks {ranks}: this process is one of a job of {os.environ['WORLD_SIZE']} already; leave --ranks out"
        )
    command = [sys.executable, "-m", "calledshot", *_without_ranks(sys.argv[1:])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said: list[IO[bytes] | None] = []
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(ranks):
            own = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115
            said.append(own)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {key: str(value) for key, value in (place | meeting).items()}
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=own,
                    stderr=own,
                    start_new_session=True,
                    preexec_fn=_end_with_parent(),
                )
            )
        return _watch(processes, said)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _watch(processes: list[subprocess.Popen[bytes]], said: list[IO[bytes] | None]) -> int:
    """Waits for all; once one has failed, the others get some time to notice."""
    first: tuple[int, int] | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        failed = next(((rank, code) for rank, p in enumerate(processes) if (code := p.poll()) not in (None, 0)), None)
        if first is None and failed is not None:
            first = failed
            if failed[1] not in (130, 143):
                deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(POLL_SECONDS)
    codes = [process.returncode for process in processes]
    rank = first[0] if first else next((number for number, code in enumerate(codes) if code), 0)
    if rank and codes[rank] not in (130, 143):
        _repeat(rank, codes[rank], said[rank])
    code = codes[rank]
    return code if code >= 0 else 128 - code


def _repeat(rank: int, code: int, said: IO[bytes] | None) -> None:
    """The last lines of a rank that ended first."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"shot: rank {rank} {how}", file=sys.stderr)
    if said is not None:
        said.seek(0)
        lines = [line for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        for line in lines[-LAST_LINES:]:
            print(f"  rank {rank}: {line}", file=sys.stderr)


def _without_ranks(arguments: list[str]) -> list[str]:
    """A command line without `--ranks N` or `--ranks=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--ranks":
            skip = True
        elif not argument.startswith("--ranks="):
            kept.append(argument)
    return kept


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, what makes a child end with its parent, however that ends."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
