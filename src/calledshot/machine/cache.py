"""Where torch.compile keeps what it has compiled, so that the next start need not. torch is not imported."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

VOLATILE = ("tmpfs", "ramfs", "overlay")
"""File systems that end with the machine's power, or with the container."""


def compile_cache(environment: Mapping[str, str] = os.environ, mounts: Path = Path("/proc/mounts")) -> dict[str, Any]:
    """`path` of the cache; whether it is `warm`, holding compiled graphs of any recipe; and whether it is `persistent`:
    outside of the folder for temporary files, and on a disk that outlives the container.
    """
    path = Path(environment.get("TORCHINDUCTOR_CACHE_DIR") or _default()).absolute()
    warm = False
    with suppress(OSError), os.scandir(path / "fxgraph") as graphs:
        warm = next(graphs, None) is not None
    temporary = Path(tempfile.gettempdir()).resolve()
    resolved = path.resolve()
    persistent = temporary not in resolved.parents and _file_system(resolved, mounts) not in VOLATILE
    return {"path": str(path), "warm": warm, "persistent": persistent}


def _default() -> str:
    """As torch chooses it."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user may have no name
        user = f"uid_{os.getuid()}"
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def _file_system(path: Path, mounts: Path) -> str:
    """Type of the file system that a path is on; empty where the system does not say."""
    found = ""
    with suppress(OSError):
        deepest = -1
        for line in mounts.read_text(errors="replace").splitlines():
            _, place, kind, *_ = line.split()
            # Later mounts lie over earlier ones.
            if (path == Path(place) or Path(place) in path.parents) and len(Path(place).parts) >= deepest:
                deepest, found = len(Path(place).parts), kind
    return found
