"""One writer a run directory: a lock that dies with its process, kill -9 included, and that readers can look at."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from calledshot.recipe.errors import RunError
from calledshot.rundir.files import utc_now, write_failure

_PATIENCE_SECONDS = 1.0  # a reader that looks holds a shared lock for microseconds; do not take it for a writer
_held: set[int] = set()


def _close_inherited() -> None:
    # A forked data worker that outlives a killed trainer would keep the lock alive through the inherited descriptor.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


class RunLock:
    """Exclusive use of a run directory until `release`, the end of a `with`, or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Takes the lock in file `path` (created if need be). RunError names the process that holds it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_failure(path, error) from error
        try:
            _take(descriptor, path)
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "command": shlex.join(sys.orig_argv),
                "time": utc_now(),
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        except OSError as error:
            os.close(descriptor)
            raise write_failure(path, error) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Gives the lock up; does nothing the second time, and nothing in a forked child."""
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _take(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            raise RunError(
                f"{path}: this file system has no file locks ({error.strerror}); "
                "mount it with them or keep the run on another disk"
            ) from error
        holder = lock_holder(path)
        command = textwrap.shorten(str(holder.get("command", "?")), 120)
        raise RunError(
            f"{path.parent}: in use by process {holder.get('pid', '?')} on {holder.get('host', '?')} ({command}) "
            f"since {holder.get('time', '?')}; wait for it or stop it first"
        )


def lock_holder(path: Path) -> dict[str, Any]:
    """Who took the lock last: pid, host, command, time; {} when nobody said so."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_locked(path: Path) -> bool | None:
    """Whether a living process holds the lock; None where that cannot be known (no lock file, or no locks here)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
