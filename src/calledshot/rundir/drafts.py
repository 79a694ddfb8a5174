"""Folders that appear whole or not at all: made under a hidden name beside their place, and moved there at the end."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to be filled and renamed; at the end of the `with` it is gone, unless it was.

    What killed processes left of their drafts of the same place goes first. A draft is locked while its process lives,
    so that nobody takes it for such a leftover. OSError where it cannot be made.
    """
    place = path.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in _drafts(place):
        if (lock := _lock(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp")
    draft.mkdir()
    lock = _lock(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _drafts(place: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{12}}\.tmp")
    return [entry for entry in place.parent.iterdir() if name.fullmatch(entry.name) and entry.is_dir()]


def _lock(folder: Path) -> int | None:
    """The descriptor that holds a folder until it is closed; None where another process does, or the disk knows no
    locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
