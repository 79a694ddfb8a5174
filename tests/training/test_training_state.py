"""A checkpoint's files are safetensors, though their own library does not write them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from calledshot.rundir import RunDirectory
from calledshot.training import state


def test_the_files_are_what_safetensors_itself_would_have_written(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", recipe_toml="", identity="")
    dtypes = (torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.bool, torch.float16, torch.int8)
    masters = {f"odd.{place}": torch.arange(3 + place).to(dtype) for place, dtype in enumerate(dtypes)}
    masters |= {"steps": torch.tensor(7), "none": torch.zeros(0, 4), "transposed": torch.randn(3, 5).T}
    moments = {f"blocks.{n}.matrix.first": torch.randn(4, 2) for n in (10, 9, 2)}
    state.save(run, state.Counters(step=5, tokens=40), masters, moments)
    run.verify(5)
    folder = run.checkpoint_path(5)
    found = load_file(folder / state.MODEL)
    assert found.keys() == masters.keys()
    for name, tensor in masters.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert (folder / state.OPTIMIZER).read_bytes() == save(moments)
    assert state.read_counters(folder) == state.Counters(step=5, tokens=40)
