import os
from pathlib import Path

import pytest


@pytest.fixture
def corpora() -> Path:
    """Real data that is not part of the repository."""
    root = Path(os.environ.get("CALLEDSHOT_DATA") or Path(__file__).parents[3] / "shared" / "data") / "corpora"
    if not root.is_dir():
        pytest.skip(f"no acceptance data at {root}; set CALLEDSHOT_DATA")
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Relative paths of sources are looked up in the current folder first."""
    monkeypatch.chdir(tmp_path)
