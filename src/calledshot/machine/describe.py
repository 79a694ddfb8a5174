"""What this machine is: for environment.json, for `shot doctor`, and as a key to arithmetic that repeats."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calledshot.machine.cache import compile_cache
from calledshot.machine.cpu import cpu_flags, cpu_model, cpu_quota, loaded_libraries, memory, usable_cores
from calledshot.machine.gpu import driver_version, gpus

NUMERICS_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)
"""Environment variables that make the arithmetic libraries take other kernels."""


def torch_build() -> dict[str, str | None]:
    """`version` of the installed torch and the `cuda` and `hip` it was built for, None without; it is not imported."""
    spec = importlib.util.find_spec("torch")
    build: dict[str, str | None] = {"version": None, "cuda": None, "hip": None}
    if spec is None or spec.origin is None:
        return build
    version = Path(spec.origin).with_name("version.py")
    if version.exists():
        found = runpy.run_path(str(version))
        return {"version": str(found.get("__version__")), "cuda": found.get("cuda"), "hip": found.get("hip")}
    return {**build, "version": importlib.metadata.version("torch")}


def threads() -> int:
    """Threads that torch computes with: what it says where it is loaded, else what it would take."""
    if torch := sys.modules.get("torch"):
        return torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


def describe() -> dict[str, Any]:
    """This machine as plain JSON; torch is not imported. The report and `shot diff` print it as it is."""
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch_build(),
        "cpu": {"model": cpu_model(), "flags": cpu_flags(), "cores": usable_cores(), "quota": cpu_quota()},
        "threads": threads(),
        "memory": memory(),
        "gpus": [
            {key: value for key, value in asdict(gpu).items() if key in ("index", "name", "uuid", "memory_bytes")}
            for gpu in gpus()
        ],
        "driver": driver_version(),
        **loaded_libraries(),
        "compile_cache": compile_cache(),
        "fingerprint": fingerprint(),
    }


def fingerprint() -> str:
    """What CPU arithmetic depends on to the last bit, as one readable line: processor, instruction sets, torch, threads
    and variables that choose kernels. Losses are expected to repeat exactly only where it is the same."""
    parts = [cpu_model(), " ".join(cpu_flags()), f"torch {torch_build()['version']}", f"{threads()} threads"]
    parts += [f"{name}={os.environ[name]}" for name in NUMERICS_VARIABLES if name in os.environ]
    return "; ".join(parts)
