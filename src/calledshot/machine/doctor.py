"""What this machine lacks for training, each with the command that would fix it. torch is not imported."""

from __future__ import annotations

import ctypes.util
import fcntl
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calledshot.machine.describe import describe

GIB = 2**30
LOW_DISK_BYTES, LOW_MEMORY_BYTES = 5 * GIB, 2 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    subject: str
    level: Literal["good", "could be better", "lacking"]
    """`lacking` means that something will not work; `could be better` that it will, slower or with less."""
    text: str
    fix: str = ""
    """The command, or the place to look, that would fix it; empty where nothing is to be done."""


def diagnose(lab: Path, machine: dict[str, Any] | None = None) -> list[Finding]:
    """Everything `shot doctor` says about this machine and the disk of a lab; `machine` is from `describe`."""
    machine = machine or describe()
    return [
        *_torch(machine),
        *_cpu(machine),
        *_preload(machine),
        *_compiler(),
        *_compile_cache(machine),
        *_corpora(),
        *_memory(machine),
        *_disk(lab),
    ]


def _torch(machine: dict[str, Any]) -> Iterator[Finding]:
    torch, gpus = machine["torch"], machine["gpus"]
    built_for_gpu = torch["cuda"] or torch["hip"]
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if torch["version"] is None:
        yield Finding("torch", "lacking", "is not installed; training and evaluation need it", f"{pip} torch")
        return
    if gpus and not built_for_gpu:
        text = f"{torch['version']} is a CPU build, so {len(gpus)} × {gpus[0]['name']} stay unused"
        yield Finding(
            "torch", "lacking", text, f"{pip} --force-reinstall torch==CUDA-BUILD (see pytorch.org/get-started)"
        )
    elif built_for_gpu and not gpus:
        text = f"{torch['version']} carries gigabytes for a GPU that is not here; it works, and starts slower"
        yield Finding("torch", "could be better", text, "the CPU build, by the command of pytorch.org/get-started")
    else:
        yield Finding("torch", "good", str(torch["version"]))
    if gpus:
        yield Finding("gpu", "good", f"{len(gpus)} × {gpus[0]['name']}, driver {machine['driver']}")
    elif any(Path("/dev").glob("nvidia[0-9]*")):
        text = "there is a GPU device, but its driver's library cannot be loaded"
        yield Finding("gpu", "lacking", text, "nvidia-smi (and see what it complains about)")
    else:
        yield Finding("gpu", "could be better", "none; recipes up to some 50M parameters train on the CPU")


def _cpu(machine: dict[str, Any]) -> Iterator[Finding]:
    cpu = machine["cpu"]
    flags = set(cpu["flags"])
    quick = next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), None)
    text = f"{cpu['model']}, {cpu['cores']} usable cores"
    if quick:
        yield Finding("cpu", "good", f"{text}, bfloat16 in hardware ({quick})")
    else:
        yield Finding("cpu", "could be better", f"{text}, no bfloat16 in hardware: float32 will be quicker there")
    if machine["threads"] != cpu["cores"]:
        text = f"OMP_NUM_THREADS makes torch take {machine['threads']} threads where {cpu['cores']} cores are usable"
        yield Finding("threads", "could be better", text, "unset OMP_NUM_THREADS, or set parallel.threads")
    else:
        yield Finding("threads", "good", f"{machine['threads']}, one for each core")


def _preload(machine: dict[str, Any]) -> Iterator[Finding]:
    """Measured on two cores with AMX: tcmalloc with libiomp5 trains 8 to 34 % quicker, tcmalloc alone 1 to 21 %."""
    allocator, openmp = machine["allocator"], machine["openmp"]
    if sys.platform != "linux" or machine["gpus"]:
        yield Finding("allocator", "good", f"{allocator}'s")
        return
    if allocator == "tcmalloc" and openmp == "libiomp5":
        yield Finding("allocator", "good", "tcmalloc and libiomp5 are loaded")
        return
    tcmalloc = _library("tcmalloc_minimal") or _library("tcmalloc")
    libiomp = _library("iomp5")
    commands = []
    if tcmalloc is None:
        commands.append("sudo apt-get install --yes libtcmalloc-minimal4")
        tcmalloc = "libtcmalloc_minimal.so.4"
    wanted = [] if allocator == "tcmalloc" else [tcmalloc]
    if "x86_64" in os.uname().machine:
        if libiomp is None:
            commands.append(f"{shlex.quote(sys.executable)} -m pip install intel-openmp")
            libiomp = str(Path(sys.prefix) / "lib" / "libiomp5.so")
        wanted.append(libiomp)
    if not wanted:
        yield Finding("allocator", "good", f"{allocator} is loaded")
        return
    before = os.environ.get("LD_PRELOAD", "")
    commands.append(f"export LD_PRELOAD={shlex.quote(':'.join([*wanted, *([before] if before else [])]))}")
    text = f"{allocator}'s; training gained 8 to 34 % from tcmalloc with libiomp5 preloaded (two AMX cores)"
    yield Finding("allocator", "could be better", text, " && ".join(commands))


def _library(name: str) -> str | None:
    """Path or loadable name of a shared library; pip's packages put theirs under the environment's lib/."""
    own = Path(sys.prefix) / "lib" / f"lib{name}.so"
    if own.exists():
        return str(own)
    return ctypes.util.find_library(name)


def _compiler() -> Iterator[Finding]:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    found = next((path for name in wanted if (path := shutil.which(name.split()[0]))), None)
    if found is None:
        text = f"no {' or '.join(wanted)}, so torch.compile cannot work and training on a CPU is 1.2 to 1.6 × slower"
        yield Finding("compiler", "could be better", text, "sudo apt-get install --yes g++")
    else:
        yield Finding("compiler", "good", found)
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        text = "Python.h is missing, which torch.compile needs for GPUs"
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield Finding("headers", "could be better", text, f"sudo apt-get install --yes {package}")


def _compile_cache(machine: dict[str, Any]) -> Iterator[Finding]:
    cache = machine["compile_cache"]
    text = f"{cache['path']}: {'holds compiled code' if cache['warm'] else 'empty, so that a first start compiles'}"
    if cache["persistent"]:
        yield Finding("compile cache", "good", text)
    else:
        fix = (
            "export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor (a local disk; on machines that go, one they share)"
        )
        yield Finding("compile cache", "could be better", f"{text}; lost with the machine's temporary files", fix)


def _corpora() -> Iterator[Finding]:
    missing = [name for name in ("pyarrow", "zstandard") if importlib.util.find_spec(name) is None]
    if missing:
        text = f"{' and '.join(missing)} missing: Parquet and .zst corpora cannot be read"
        fix = f"{shlex.quote(sys.executable)} -m pip install 'calledshot[corpora]'"
        yield Finding("corpora", "could be better", text, fix)
    else:
        yield Finding("corpora", "good", "Parquet and .zst can be read")


def _memory(machine: dict[str, Any]) -> Iterator[Finding]:
    free, total = machine["memory"]["available_bytes"], machine["memory"]["total_bytes"]
    text = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if limit := machine["memory"]["limit_bytes"]:
        text += f", {limit / GIB:.1f} granted to this container"
    if free < LOW_MEMORY_BYTES:
        yield Finding("memory", "could be better", f"{text}; the smallest recipes need 2", "shot recipe memory RECIPE")
    else:
        yield Finding("memory", "good", text)


def _disk(lab: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(lab).free
    text = f"{lab}: {free / GIB:.1f} GiB free"
    if free < LOW_DISK_BYTES:
        yield Finding(
            "disk", "could be better", f"{text}; checkpoints and shards soon fill that", f"du -sh {lab}/runs/*"
        )
    else:
        yield Finding("disk", "good", text)
    try:
        with tempfile.TemporaryFile(dir=lab) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        text = f"{lab}: a run cannot be locked there ({error.strerror})"
        yield Finding(
            "disk", "lacking", text, "use a folder you can write, on a file system mounted with locks (flock)"
        )
