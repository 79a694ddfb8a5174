"""Losses of twenty steps, as they were when they were last declared right: a change that is not about arithmetic does
not move them by one bit.

Elsewhere than on the machines in golden.json they agree as far as the arithmetic allows. AdamW in float32 does to
1e-5. Muon orthogonalises in bfloat16 whatever the rest computes in, and AdamW makes an update out of the sign of a
gradient that rounding to bfloat16 may flip: the bounds below are about five times the largest distance that was seen
between kernels for AVX2, for AVX-512 with and without bfloat16, and for plain C++.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from write_golden import CASES, command, golden, losses

from calledshot.rundir import RunDirectory

TOLERANCE = {
    ("adamw", "float32"): 1e-5,
    ("muon", "float32"): 5e-4,
    ("muon", "bfloat16"): 1e-3,
    ("adamw", "bfloat16"): 3e-2,
}
"""Largest relative difference on another machine."""


@pytest.mark.parametrize(("optimizer", "dtype"), CASES)
def test_losses_are_golden(lab: Path, optimizer: str, dtype: str) -> None:
    case = f"{optimizer} {dtype}"
    machine, got = losses(lab, optimizer, dtype)
    known = golden()
    if machine in known:
        assert got == known[machine][case]
    else:
        for values in known.values():
            assert got == pytest.approx(values[case], rel=TOLERANCE[optimizer, dtype])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "dtype"), CASES)
@pytest.mark.parametrize("kernels", ["ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=AVX2"])
def test_losses_are_nearly_golden_with_the_kernels_of_other_processors(
    lab: Path, optimizer: str, dtype: str, kernels: str
) -> None:
    name = f"kernels-{optimizer}-{dtype}-{kernels.partition('=')[0]}"
    variable, _, value = kernels.partition("=")
    process = [sys.executable, "-m", "calledshot", *command(optimizer, dtype, name)]
    subprocess.run(process, cwd=lab, env={**os.environ, variable: value}, check=True, capture_output=True)
    run = RunDirectory(lab / "runs" / name)
    (machine,) = run.load("probes")["machines"]
    assert machine not in golden(), "the fingerprint names the variable"
    for values in golden().values():
        expected = pytest.approx(values[f"{optimizer} {dtype}"], rel=TOLERANCE[optimizer, dtype])
        assert [row["loss"] for row in run.metrics()] == expected
