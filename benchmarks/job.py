"""The ranks of one start of a run, what ends them from inside, and the disk that they write to."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import PATIENCE_SECONDS, Shot, start_gang

from calledshot.cli.ranks import GRACE_SECONDS

STEPS, EVERY, KEEP = 48, 3, 3
OVERRIDES = (
    "model.heads=4", "model.kv_heads=2", "model.width=64", f"duration.tokens={128 * STEPS}", "parallel.micro_tokens=32",
    f"checkpoint.every_steps={EVERY}", "evals.every_steps=8", f"checkpoint.keep={KEEP}",
)  # fmt: skip
"""Steps of four rows, one at a time, and nearly always a save in flight."""


@dataclass(frozen=True)
class Layout:
    """How many ranks, and what they share."""

    name: str
    ranks: int = 1
    overrides: tuple[str, ...] = ()


def read_rows(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The whole lines of a log, from a byte on."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class Job:
    """The ranks of one start, and what a launcher does about them."""

    def __init__(
        self,
        lab: Path,
        run: str,
        layout: Layout,
        before: Callable[[], None] | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        command = ("train", "tiny.toml", "--name", run, *OVERRIDES, *layout.overrides, *overrides)
        self.log = lab / "runs" / run / "metrics.jsonl"
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        self.first_row: float | None = None
        """Seconds from the start to the first row of metrics."""
        self.outlasted = 0
        """Ranks that had to be killed after another had ended."""
        self.began = time.monotonic()
        if layout.ranks == 1:
            self.ranks = [Shot(lab, *command, before=before)]
        else:
            self.ranks = start_gang(lab, layout.ranks, *command, before=before)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics since the start."""
        rows = read_rows(self.log, self.offset)
        if rows and self.first_row is None:
            self.first_row = time.monotonic() - self.began
        return rows

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Waits until it holds; False when a rank ended before. TimeoutError when neither happens."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            holds, alive = condition(), all(rank.alive for rank in self.ranks)
            if holds or not alive:
                return bool(holds or condition())
            if time.monotonic() > deadline:
                raise TimeoutError
            if self.first_row is None:
                self.rows()
            time.sleep(0.002)

    def signal(self, number: signal.Signals, ranks: Sequence[Shot]) -> None:
        """Sends a signal to those of some ranks that live."""
        for rank in ranks:
            with suppress(ProcessLookupError):
                rank.signal(number)

    def end(self) -> tuple[list[int], list[str]]:
        """Waits for all ranks as `--ranks N` does, which lets the others be for a while when one has failed; exit codes
        and what they said. TimeoutError when they go on."""
        deadline, grace = time.monotonic() + PATIENCE_SECONDS, float("inf")
        while any(rank.alive for rank in self.ranks):
            if self.first_row is None:
                self.rows()
            if grace == float("inf") and any(rank.process.exitcode not in (None, 0, 130, 143) for rank in self.ranks):
                grace = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                raise TimeoutError
            if time.monotonic() > grace and not self.outlasted:
                self.outlasted = sum(rank.alive for rank in self.ranks)
                self.signal(signal.SIGKILL, self.ranks)
            time.sleep(0.005)
        ended = [rank.end() for rank in self.ranks]
        return [one.code for one in ended], [one.said for one in ended]


# In the processes of a run


def die_after(mark: str, number: int, victim: int) -> None:
    """For `before`: from the first use of a path that contains `mark` on, the rank dies just before its Nth use of a
    file or folder, in whichever thread."""
    if int(os.environ.get("RANK", "0")) != victim:
        return
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        if seen or any(mark in str(one) for one in arguments[:2]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def limit_files(size: int) -> None:
    """For `before`: no file can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_turn(*tasks: Callable[[], None]) -> None:
    """For `before`."""
    for task in tasks:
        task()


class Disk:
    """The folder of the runs: a small file system of its own where one can be mounted, so that it can be full."""

    SIZE = 128 * 2**20

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._filler = folder, folder / ".filler"
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}", "tmpfs", str(folder)]
        try:
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            self.mounted = False

    def fill(self, free: int) -> None:
        """Leaves so many bytes, whatever else is written meanwhile."""
        with open(self._filler, "ab") as file:
            while (more := shutil.disk_usage(self.folder).free - free) > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), more)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def clear(self) -> None:
        """Makes room again."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts it."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
