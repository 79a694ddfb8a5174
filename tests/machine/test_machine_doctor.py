from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calledshot.machine import Finding, describe, diagnose
from calledshot.machine.cache import compile_cache


def machine(**changes: Any) -> dict[str, Any]:
    return {**describe(), "gpus": [], **changes}


def finding(lab: Path, subject: str, **changes: Any) -> Finding:
    return next(one for one in diagnose(lab, machine(**changes)) if one.subject == subject)


CPU_BUILD = {"version": "2.13.0+cpu", "cuda": None, "hip": None}
CUDA_BUILD = {"version": "2.13.0+cu130", "cuda": "13.0", "hip": None}
H200 = [{"index": 0, "name": "NVIDIA H200", "uuid": "GPU-0", "memory_bytes": 150_000_000_000}]


def test_torch_and_the_machine_must_go_together(tmp_path: Path) -> None:
    unused = finding(tmp_path, "torch", torch=CPU_BUILD, gpus=H200)
    assert unused.level == "lacking"
    assert "1 × NVIDIA H200 stay unused" in unused.text
    assert "pip install --force-reinstall torch" in unused.fix
    assert finding(tmp_path, "torch", torch=CUDA_BUILD).level == "could be better"
    assert finding(tmp_path, "torch", torch=CUDA_BUILD, gpus=H200).level == "good"
    assert finding(tmp_path, "torch", torch=CPU_BUILD).level == "good"
    absent = finding(tmp_path, "torch", torch=dict.fromkeys(CPU_BUILD))
    assert absent.level == "lacking"
    assert absent.fix.endswith("-m pip install torch")


def test_a_quicker_allocator_is_advised_on_a_cpu_only(tmp_path: Path) -> None:
    slow = finding(tmp_path, "allocator", allocator="system", openmp="libgomp")
    assert slow.level == "could be better"
    preload = slow.fix.split("export LD_PRELOAD=")[1]
    assert "tcmalloc" in preload
    assert finding(tmp_path, "allocator", allocator="tcmalloc", openmp="libiomp5").level == "good"
    on_a_gpu = finding(tmp_path, "allocator", allocator="system", gpus=H200)
    assert (on_a_gpu.level, on_a_gpu.text) == ("good", "system's")


def test_no_compiler_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert finding(tmp_path, "compiler").level == "good"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert finding(tmp_path, "compiler").fix == "sudo apt-get install --yes g++"
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert finding(tmp_path, "headers").fix.endswith(f"python3.{sys.version_info.minor}-dev")


def test_the_compilers_cache(tmp_path: Path) -> None:
    """That it is where torch puts it, and whether what it holds outlives the machine's next start."""
    code = """
import json, os, sys
from calledshot.machine import describe
found = describe()["compile_cache"]
from torch._inductor.runtime.cache_dir_utils import cache_dir
assert found["path"] == cache_dir(), (found, cache_dir())
"""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/vda / ext4 rw 0 0\nnone /scratch tmpfs rw 0 0\n/dev/vdb /scratch/disk xfs rw 0 0\n")

    def cache(path: str) -> tuple[bool, bool]:
        found = compile_cache({"TORCHINDUCTOR_CACHE_DIR": path}, mounts)
        return found["warm"], found["persistent"]

    assert cache("/srv/ada/.cache/torchinductor") == (False, True)
    assert cache("/scratch/torchinductor") == (False, False)
    assert cache("/scratch/disk/torchinductor") == (False, True)
    (tmp_path / "fxgraph" / "ab").mkdir(parents=True)
    assert cache(str(tmp_path)) == (True, False)  # tests live among temporary files
    lost = finding(tmp_path, "compile cache", compile_cache={"path": "/srv/x", "warm": True, "persistent": False})
    assert "holds compiled code; lost with" in lost.text
    assert "TORCHINDUCTOR_CACHE_DIR=" in lost.fix
    kept = finding(tmp_path, "compile cache", compile_cache={"path": "/x", "warm": False, "persistent": True})
    assert (kept.level, kept.fix) == ("good", "")


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else object())
    found = next(one for one in diagnose(tmp_path, here) if one.subject == "corpora")
    assert found.text.startswith("pyarrow missing")
    assert "'calledshot[corpora]'" in found.fix


def test_threads_memory_and_bfloat16(tmp_path: Path) -> None:
    cpu = {"model": "old", "flags": ["avx2"], "cores": 8, "quota": None}
    assert "no bfloat16" in finding(tmp_path, "cpu", cpu=cpu).text
    assert "OMP_NUM_THREADS" in finding(tmp_path, "threads", cpu=cpu, threads=1).fix
    assert finding(tmp_path, "threads", cpu=cpu, threads=8) == Finding("threads", "good", "8, one for each core")
    little = {"total_bytes": 2**35, "available_bytes": 2**30, "limit_bytes": 2**31}
    assert finding(tmp_path, "memory", memory=little).text.startswith(
        "1.0 GiB free of 32.0, 2.0 granted to this container"
    )


def test_a_folder_where_no_run_can_be_locked(tmp_path: Path) -> None:
    disk = [one for one in diagnose(Path("/proc"), machine()) if one.subject == "disk"]
    assert disk[-1].level == "lacking"
    assert "cannot be locked" in disk[-1].text
    assert all("cannot be locked" not in one.text for one in diagnose(tmp_path, machine()))
    assert list(tmp_path.iterdir()) == []


def test_shot_doctor(tmp_path: Path) -> None:
    code = (
        "import sys; from calledshot.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path
    )
    found = json.loads(done.stdout)
    assert done.returncode == int(found["lacking"]), done.stderr
    assert found["machine"]["cpu"]["cores"] >= 1
    assert {"torch", "cpu", "memory", "disk"} <= {one["subject"] for one in found["findings"]}
    plain = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert plain.returncode == done.returncode
    for one in found["findings"]:
        assert not one["fix"] or f"→ {one['fix']}" in plain.stdout
