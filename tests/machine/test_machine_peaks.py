from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calledshot import machine
from calledshot.machine import mfu_range, table_peak

rates = st.floats(1e9, 1e18)


def test_only_the_exact_card_has_a_peak() -> None:
    assert table_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert table_peak("NVIDIA H100 PCIe") == 756e12
    assert table_peak("Tesla V100-SXM2-32GB", "float16") == 125e12
    assert table_peak("Tesla V100-SXM2-32GB", "bfloat16") is None
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100", "NVIDIA A10", "AMD Instinct MI300X", ""):
        assert table_peak(unknown) is None


@given(rates, st.lists(rates, min_size=1, max_size=5))
def test_no_share_over_one_is_ever_given(flops: float, peaks: list[float]) -> None:
    low, high, reason = mfu_range(flops, peaks)
    assert (low is None) == (flops > max(peaks))
    assert (high is None) == (flops > min(peaks))
    assert bool(reason) == (high is None)
    if low is not None:
        assert low == flops / max(peaks) <= 1
    if high is not None:
        assert low is not None
        assert low <= high <= 1


def test_why_an_mfu_is_refused() -> None:
    assert mfu_range(40e12, [80e12, 100e12]) == (0.4, 0.5, "")
    assert mfu_range(563e12, [100e12]).reason.startswith("563% of the highest peak")
    assert mfu_range(90e12, [80e12, 100e12])[:2] == (0.9, None)
    assert mfu_range(1.0, []).reason == "no peak was probed"
    assert mfu_range(float("nan"), [1e12])[:2] == (None, None)
    assert mfu_range(1.0, [float("inf"), 0.0])[:2] == (None, None)


def test_a_matmul_counts_two_operations_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "mm", lambda *_, **__: time.sleep(0.02))  # the largest shape then has the highest rate
    lowest, highest = machine.matmul_peak("float32", seconds=1.0)
    assert lowest <= highest <= 2 * 2048**3 / 0.02
    assert highest == pytest.approx(2 * 2048**3 / 0.02, rel=0.2)


def test_probes_agree_with_a_stopwatch() -> None:
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big, other = torch.ones(2**26), torch.zeros(2**26)

    def seconds(work: object) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    assert machine.matmul_peak("float32", seconds=0.3).highest == pytest.approx(
        2 * 1024**3 / seconds(lambda: a @ b), rel=4
    )
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    assert machine.matmul_peak("bfloat16", seconds=0.01).lowest > 0
    assert torch.equal(torch.randn(3), expected)  # a run's random numbers are its own
    copied = 2 * big.nbytes / seconds(lambda: other.copy_(big))
    assert copied / 5 < machine.memory_bandwidth(0.2) < copied * 5


def test_fingerprint_changes_with_what_changes_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = machine.fingerprint()
    assert machine.fingerprint() == before
    assert f"torch {torch.__version__}" in before
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert machine.fingerprint() != before
    torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.fingerprint().startswith(before)
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in machine.fingerprint()


def test_describing_a_machine_does_not_import_torch() -> None:
    code = """
import sys, json
from calledshot import machine
found = machine.describe()
json.dumps(found, allow_nan=False)
assert "torch" not in sys.modules
import torch
assert found["torch"]["version"] == torch.__version__, found
assert found["torch"]["cuda"] == torch.version.cuda
assert found["threads"] == torch.get_num_threads()
assert found["fingerprint"] == machine.fingerprint()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
