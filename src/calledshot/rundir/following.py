"""A run as the ranks see it that do not write it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calledshot.rundir.run import Document, Log, RunDirectory


class _Nothing:
    """A log that nothing is written to."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Forgets a row."""

    def sync(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


class FollowedRun(RunDirectory):
    """A run whose incarnation another process has begun and writes; all that it would write itself is dropped, but for
    `rank_writer` and the files of a checkpoint."""

    def __init__(self, path: Path, incarnation: int) -> None:
        super().__init__(path)
        self._incarnation = incarnation

    def writer(self, log: Log) -> Any:
        """A log that drops what it is given."""
        del log
        return _Nothing()

    def set_status(self, **fields: Any) -> None:
        """Dropped."""

    def save(self, document: Document, content: Mapping[str, Any]) -> None:
        """Dropped."""
