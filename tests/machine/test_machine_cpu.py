from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from calledshot.machine import cpu

SAPPHIRE_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
stepping\t: 8
flags\t\t: fpu sse4_2 avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: another
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd sve bf16 i8mm
CPU part\t: 0xd40
CPU revision\t: 1
"""


def place(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_processor_and_what_it_can_do(tmp_path: Path) -> None:
    place(tmp_path, {"intel": SAPPHIRE_RAPIDS, "arm": GRAVITON})
    assert cpu.cpu_model(tmp_path / "intel") == "Intel(R) Xeon(R) Processor @ 2.10GHz (6/143/8)"
    assert {"amx_bf16", "avx512_bf16", "avx2"} <= set(cpu.cpu_flags(tmp_path / "intel"))
    assert "fpu" not in cpu.cpu_flags(tmp_path / "intel")
    assert cpu.cpu_model(tmp_path / "arm").endswith("(0xd40/1)")
    assert cpu.cpu_flags(tmp_path / "arm") == ["asimd", "bf16", "sve", "i8mm"]
    assert cpu.cpu_flags(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/pod/task\n",
                "sys/fs/cgroup/pod/task/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",  # the one above is the tighter
            },
            2.0,
        ),
        # a container sees its own bound at the top, under a path that is the host's
        ({"proc/self/cgroup": "0::/kubepods/x\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
    ],
)
def test_quota_of_a_container(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    root = place(tmp_path, files)
    assert cpu.cpu_quota(root) == quota
    assert 1 <= cpu.usable_cores(root) <= max(1, int(quota or 1_000_000))


@pytest.mark.parametrize(
    ("group", "folder", "bound", "usage"),
    [
        ("0::/a", "a", "memory.max", "memory.current"),
        ("4:memory:/a", "memory/a", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_memory_of_a_container_is_what_it_was_granted(
    tmp_path: Path, group: str, folder: str, bound: str, usage: str
) -> None:
    inside = f"sys/fs/cgroup/{folder}"
    files = {
        "proc/self/cgroup": f"{group}\n",
        f"{inside}/{bound}": f"{64 * 2**20}\n",
        f"{inside}/{usage}": f"{60 * 2**20}\n",
    }
    memory = cpu.memory(place(tmp_path, files))
    assert memory["limit_bytes"] == 64 * 2**20
    assert memory["available_bytes"] == 4 * 2**20
    place(tmp_path, {f"{inside}/{bound}": f"{2**63 - 4096}\n"})
    assert cpu.memory(tmp_path)["limit_bytes"] is None


def test_preloaded_libraries_are_seen(tmp_path: Path) -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 42   "
    place(
        tmp_path,
        {
            "both": f"{line}/lib/libtcmalloc_minimal.so.4.5.10\n{line}/venv/lib/libiomp5.so\n{line}/lib/libgomp.so.1\n",
            "neither": f"{line}/usr/lib/libc.so.6\n{line}/venv/torch/lib/libgomp-a34b3233.so.1\n",
        },
    )
    assert cpu.loaded_libraries(tmp_path / "both") == {"allocator": "tcmalloc", "openmp": "libiomp5"}
    assert cpu.loaded_libraries(tmp_path / "neither") == {"allocator": "system", "openmp": "libgomp"}


FAULTS = """
import resource
from calledshot.machine import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block) // 4096)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = [faults() for _ in range(3)]
kept = keep_freed_memory()
print(kept, plain[-1] > 10_000, [faults() for _ in range(3)][-1] < 1_000)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
@pytest.mark.parametrize(
    ("environment", "said"),
    [({}, "True True True"), ({"MALLOC_ARENA_MAX": "1"}, "False True False")],
    ids=["kept", "the user chose"],
)
def test_memory_that_was_freed_is_kept_for_the_next_step(environment, said):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=clean | environment, capture_output=True, text=True)
    assert ran.stdout.strip() == said, ran.stderr
