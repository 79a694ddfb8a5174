"""Real data that is not part of this repository, and threads that wait politely."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from calledshot.cli import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # as `shot` does, for tests beside whatever else the machine does


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Gives the path of a file of acceptance data; skips the test where it is absent."""
    root = Path(os.environ.get("CALLEDSHOT_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"no acceptance data: {root / name} (set CALLEDSHOT_DATA)")
        return root / name

    return find
