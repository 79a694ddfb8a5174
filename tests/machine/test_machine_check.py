from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calledshot.machine import check


def verdict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    code = check.main(list(arguments))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return code, json.loads(lines[0])


@pytest.mark.parametrize("name", ["memory", "disk", "clock", "matmul", "cpu"])
def test_a_sound_machine_passes(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calledshot.machine.check", name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["check"], found["passed"]) == (name, True)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_bit_in_one_of_many_matmuls_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    true, calls = torch.Tensor.__matmul__, 0

    def flaky(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        product = true(a, b)
        if calls == 7:
            product.view(torch.int32)[3, 5] ^= 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", flaky)
    code, found = verdict(capsys, "matmul")
    assert (code, found["passed"]) == (1, False)
    assert "other bits when repeated" in str(found["message"])


def test_a_processor_that_is_always_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    true = torch.Tensor.__matmul__

    def wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return true(a, b) * (1 if a.dtype == torch.float64 else 1.01)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    code, found = verdict(capsys, "matmul")
    assert (code, found["passed"]) == (1, False)
    assert "is wrong by 1.0e-02" in str(found["message"])


def test_a_clock_that_jumps_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    true, started = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: true() + (1.0 if time.monotonic() - started > 0.2 else 0.0))
    code, found = verdict(capsys, "clock", str(tmp_path))
    assert (code, found["passed"]) == (1, False)
    assert "jumped by +1.000 s" in str(found["message"])


def test_a_disk_that_is_not_there_fails_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found = verdict(capsys, "disk", str(tmp_path / "absent"))
    assert (code, found["passed"]) == (1, False)
    assert "No such file or directory" in str(found["message"])


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "memory_state", lambda: {"available_bytes": 1_000_000})
    code, found = verdict(capsys, "memory")
    assert (code, found["message"]) == (1, "only 1,000,000 bytes of memory are free")


def test_no_such_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["luck"]) == check.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "memory|disk|clock|matmul|cpu" in captured.err
