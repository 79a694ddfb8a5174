"""The processor, the memory and the limits a container puts on them, read from the operating system."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

_MATTERING_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8", "asimd", "bf16", "sve", "sve2", "i8mm"),
)
"""Instruction sets that choose between kernels of the arithmetic libraries (x86 and ARM)."""


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor with family, model and stepping, since cloud hosts call many by one name."""
    fields = _cpu_fields(cpuinfo)
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields[key] for key in ("cpu family", "model", "stepping", "CPU part", "CPU revision") if key in fields]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Instruction sets of this processor that decide which kernels run, in a fixed order."""
    fields = _cpu_fields(cpuinfo)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [flag for flag in _MATTERING_FLAGS if flag in flags]


def _cpu_fields(cpuinfo: Path) -> dict[str, str]:
    """The first processor's entry; {} where there is no such file (macOS)."""
    with suppress(OSError):
        first = cpuinfo.read_text(errors="replace").split("\n\n")[0]
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return {}


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: its affinity, further bounded by the container's quota; at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control group (v2 or v1) grants; None without a bound."""
    quotas = []
    for folder in _groups(root, "cpu"):
        with suppress(OSError, ValueError):  # v2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                quotas.append(quota / int((folder / "cpu.cfs_period_us").read_text()))
    return min(quotas, default=None)


def memory(root: Path = Path("/")) -> dict[str, int | None]:
    """`total_bytes` and `available_bytes` of this machine, `limit_bytes` of the control group (None without a bound).

    What is available is bounded by what the control group has left.
    """
    import psutil

    machine = psutil.virtual_memory()
    limit, available = None, int(machine.available)
    for folder in _groups(root, "memory"):
        for bound, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # v2 writes "max" for no bound, v1 a number larger than any machine
                bytes_ = int((folder / bound).read_text())
                if bytes_ < machine.total:
                    limit = bytes_ if limit is None else min(limit, bytes_)
                    available = min(available, max(0, bytes_ - int((folder / usage).read_text())))
    return {"total_bytes": int(machine.total), "available_bytes": available, "limit_bytes": limit}


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and of those above it, each of which may set a bound."""
    folders = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            inside = top / path.lstrip("/")
            folders += [folder for folder in (inside, *inside.parents) if folder == top or top in folder.parents]
            # Inside a container the path may be the host's, which is not mounted; the bounds are then at the top.
    return list(dict.fromkeys(folders))


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> dict[str, str]:
    """This process's `allocator` (tcmalloc, jemalloc, mimalloc, system) and `openmp` (libiomp5, libomp, libgomp)."""
    try:
        text = maps.read_text(errors="replace")
    except OSError:
        return {"allocator": "system", "openmp": "none"}
    names = set(re.findall(r"/(lib[\w-]+)[^/\s]*\.so", text))

    def first(candidates: tuple[str, ...], otherwise: str) -> str:
        return next((one for one in candidates if any(name.startswith(one) for name in names)), otherwise)

    allocator = first(("libtcmalloc", "libjemalloc", "libmimalloc"), "libsystem").removeprefix("lib")
    return {"allocator": allocator, "openmp": first(("libiomp5", "libomp", "libgomp"), "none")}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Makes glibc keep what tensors up to 1 GiB leave behind for the next ones, where by default it gives everything
    past 32 MiB back to the system, to be zeroed and mapped again page by page, a hundred thousand pages a step
    (docs/notebook.md). False, and nothing done, with another allocator or where the environment sets glibc's own."""
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if sys.platform != "linux" or chosen or loaded_libraries()["allocator"] != "system":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(key, KEPT_BYTES) for key in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
