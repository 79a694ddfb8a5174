"""What a person sees while a run trains: one line a step, on stderr and in the incarnation's log."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from calledshot.recipe import RunError


def quantity(value: float) -> str:
    """Three digits and k, M, B or T."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """`1h02m`, `3m05s` or `42s`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{left:02d}s" if minutes else f"{left}s"


def step_line(row: Mapping[str, Any], steps: int, eta_seconds: float | None) -> str:
    """step/total, loss, learning rate, gradient norm, tokens a second, MFU, memory, share of the data, time left."""
    if row["mfu_low"] is None:
        mfu = "mfu n/a"
    else:
        low, high = row["mfu_low"], row["mfu_high"]
        mfu = f"mfu {100 * low:.0f}%" if high is None else f"mfu {100 * low:.0f}-{100 * high:.0f}%"
    width = len(str(steps))
    speed = "" if row["tokens_per_second"] is None else f"{quantity(row['tokens_per_second'])} tok/s  "
    eta = "" if eta_seconds is None else f"  eta {duration(eta_seconds)}"
    return (
        f"step {row['step']:>{width}}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
        f"grad {row['grad_norm']:.3f}  {speed}{mfu}  {row['memory_bytes'] / 2**30:.2f} GiB  "
        f"data {100 * row['step'] / steps:.0f}%{eta}"
    )


class Console:
    """Prints lines and keeps them in a file; a closed terminal does not stop a run."""

    def __init__(self, log: Path, quiet: bool = False) -> None:
        self.quiet = quiet
        try:
            self._file: TextIO | None = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{log}: cannot be written ({error.strerror})") from error

    def say(self, line: str) -> None:
        for stream in (None if self.quiet else sys.stderr, self._file):
            if stream is not None:
                try:
                    print(line, file=stream, flush=True)
                except (OSError, ValueError):  # the terminal is gone, or the disk full: metrics.jsonl will say so
                    continue

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
