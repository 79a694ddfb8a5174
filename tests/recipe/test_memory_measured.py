"""The arithmetic of memory against the tensors that live in real steps (`benchmarks/memory.py` has the whole grid)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import memory, torch
count = memory.Count()
SMALL = ("model.vocabulary=2048",)

def by_hand():
    x = torch.zeros(250_000, requires_grad=True)
    count.begin()
    y = (x.exp() * 2).sin().sum()
    forward = count.peak
    del y
    count.begin()
    z = torch.empty(500_000)
    torch.add(z[:250_000], z[250_000:], out=z[:250_000])
    return forward, count.peak

forward, out = by_hand()
count.begin()
nothing = count.peak
cases = [
    memory.Case("Muon", ("model.layers=3", "optimizer.name=muon", *SMALL), "float32", rows=6, micro_rows=2),
    memory.Case("experts", ("model.layers=3", "model.experts=8", *SMALL), rows=2, micro_rows=2),
    memory.Case("both", ("model.layers=2", "model.topology=encoder-decoder", "objective.kind=span", *SMALL)),
    memory.Case("full", ("model.layers=4", "parallel.activation_checkpointing=full", *SMALL)),
]
found = {{case.name: (memory.measure(case, count), memory.predicted(case, "cpu").peak) for case in cases}}
print(json.dumps({{"forward": forward, "out": out, "nothing": nothing, "cases": found}}))
"""


@pytest.fixture(scope="module")
def said() -> dict:
    """What one process measured, which counts from before its first tensor."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler for the allocator that counts")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_instrument_counts_what_can_be_counted_by_hand(said):
    assert said["nothing"] == 0
    assert said["forward"] == pytest.approx(4e6, abs=100)  # x, its exponential, the double of that, the sine; 1 MB each
    assert said["out"] == pytest.approx(3e6, abs=100)  # x and z


def test_the_arithmetic_is_within_ten_percent_of_what_lives(said):
    errors = {name: predicted / measured - 1 for name, (measured, predicted) in said["cases"].items()}
    assert all(abs(error) < 0.1 for error in errors.values()), errors
