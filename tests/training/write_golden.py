"""Writes the losses that training gives on this machine into golden.json: `python tests/training/write_golden.py`.

Only for a change that is meant to change the arithmetic; the commit says why the new losses are right. What other
machines have given is thrown away then; add them anew with `--keep` where they still hold.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from processes import make_lab, shot

from calledshot.rundir import RunDirectory, write_json

FILE = Path(__file__).with_name("golden.json")
CASES = [(optimizer, dtype) for optimizer in ("adamw", "muon") for dtype in ("float32", "bfloat16")]


def command(optimizer: str, dtype: str, name: str) -> tuple[str, ...]:
    """What `shot` is asked for."""
    rate = {"adamw": "0.002", "muon": "0.01"}[optimizer]
    return (
        "train", "tiny.toml", "--name", name, f"optimizer.name={optimizer}", f"optimizer.learning_rate={rate}",
        "optimizer.embedding_learning_rate=0.005", f"parallel.dtype={dtype}",
    )  # fmt: skip


def losses(lab: Path, optimizer: str, dtype: str) -> tuple[str, list[float]]:
    """Fingerprint of the machine, and the losses of twenty steps."""
    name = f"golden-{optimizer}-{dtype}"
    ended = shot(lab, *command(optimizer, dtype, name))
    assert ended.code == 0, ended.said
    run = RunDirectory(lab / "runs" / name)
    (machine,) = run.load("probes")["machines"]
    return machine, [row["loss"] for row in run.metrics()]


def golden() -> dict[str, dict[str, list[float]]]:
    """Losses by case by machine."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def main() -> None:
    """Runs every case here and replaces golden.json, or with `--keep` adds this machine to it."""
    found = golden() if "--keep" in sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as folder:
        lab = make_lab(Path(folder))
        for optimizer, dtype in CASES:
            machine, values = losses(lab, optimizer, dtype)
            found.setdefault(machine, {})[f"{optimizer} {dtype}"] = values
    write_json(FILE, found)


if __name__ == "__main__":
    main()
