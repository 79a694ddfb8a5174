from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Ended, make_lab, shot

from calledshot.rundir import RunDirectory


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One lab for all tests of training, so that its data are prepared once; each takes its own names of runs."""
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def train(lab: Path) -> Callable[..., tuple[RunDirectory, Ended]]:
    """`train(NAME, OVERRIDES...)` runs `shot train tiny.toml` to its end."""

    def run(name: str, *overrides: str, before: Callable[[], None] | None = None) -> tuple[RunDirectory, Ended]:
        ended = shot(lab, "train", "tiny.toml", "--name", name, *overrides, before=before)
        return RunDirectory(lab / "runs" / name), ended

    return run


@pytest.fixture(scope="session")
def reference(train: Callable[..., tuple[RunDirectory, Ended]]) -> RunDirectory:
    """Sixty steps without an interruption, with every tenth step's checkpoint."""
    run, ended = train("reference", "duration.tokens=7680", "checkpoint.every_steps=10", "checkpoint.keep=99")
    assert ended.code == 0, ended.said
    return run
