"""Faults made to order: a process killed at each thing it does to the file system, a disk filled to the last byte."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
_KILLED = 77


def crashes(action: Callable[[], object], prepare: Callable[[], object]) -> Iterator[int]:
    """Yields after each crash: `prepare` here, then `action` in a forked child that dies just before its Nth operation,
    for N = 1, 2, … until a child lives to the end."""
    for number in range(1, 500):
        prepare()
        child = os.fork()
        if child == 0:
            seen = 0

            def hook(event: str, _: tuple[object, ...], number: int = number) -> None:
                nonlocal seen
                if event in _WATCHED:
                    seen += 1
                    if seen == number:
                        os._exit(_KILLED)

            sys.addaudithook(hook)
            code = 1
            try:
                action()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, _KILLED)
        if code == 0:
            assert number > 1, "nothing was done to the file system"
            return
        yield number
    raise AssertionError("never came to an end")


def fill(disk: Path) -> Path:
    """Uses a disk up to the last byte."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                pass
    return filler
