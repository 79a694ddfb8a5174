"""Every topology with the objectives that it can have, killed and resumed: what comes out is what an uninterrupted run
computes, to the last bit."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import curve, held_out, shot, weights

from calledshot.rundir import RunDirectory

STEPS = 20
FIRST_CHECKPOINT = 3
LENGTH = (f"duration.tokens={STEPS * 256}", "batch.tokens=256", f"checkpoint.every_steps={FIRST_CHECKPOINT}")

PREFIX, BOTH = ("model.topology=prefix",), ("model.topology=encoder-decoder",)
MIXTURE = (
    "objective.kind=mixture",
    'objective.denoisers=[{ kind = "span", rate = 0.3, mode = "R" }, { kind = "prefix", weight = 2.0, mode = "S" }]',
)
EXPERTS = ("model.experts=4", "model.top_k=2")
QUICK = {
    "encoder-decoder span t5": (*BOTH, "model.positions=t5", "objective.kind=span"),
    "experts bias bfloat16": (*EXPERTS, "model.balance=bias", "parallel.dtype=bfloat16"),
}
SLOW = {
    "prefix ul2": (*PREFIX, "objective.kind=ul2"),
    "prefix prefix": (*PREFIX, "objective.kind=prefix"),
    "prefix span": (*PREFIX, "objective.kind=span"),
    "prefix mixture": (*PREFIX, *MIXTURE),
    "prefix ul2r adamw bfloat16": (*PREFIX, "objective.kind=ul2r", "optimizer.name=adamw", "parallel.dtype=bfloat16"),
    "decoder prefix no positions": ("model.positions=none", "objective.kind=prefix"),
    "decoder span layernorm sandwich": (
        "model.norm=layernorm", "model.norm_placement=sandwich", "objective.kind=span"
    ),
    "decoder ul2 yarn": (
        "model.rope_scaling=yarn", "model.rope_factor=2", "model.rope_original_context=16", "objective.kind=ul2"
    ),
    "decoder ul2r": ("objective.kind=ul2r",),
    "decoder mixture": MIXTURE,
    "encoder-decoder prefix": (*BOTH, "objective.kind=prefix"),
    "encoder-decoder ul2 pooling": (
        *BOTH, "model.encoder_pooling=2", "model.encoder_context=96", "model.encoder_width=64",
        "model.tied_embeddings=false", "objective.kind=ul2",
    ),
    "encoder-decoder mixture adamw": (*BOTH, *MIXTURE, "optimizer.name=adamw"),
    "experts encoder-decoder auxiliary": (*BOTH, *EXPERTS, "objective.kind=span"),
    "experts prefix sigmoid shared": (
        *PREFIX, *EXPERTS, "model.router=sigmoid", "model.shared_expert_hidden=16", "model.dense_layers=1",
        "model.balance=bias", "objective.kind=ul2",
    ),
    "experts compiled": (*EXPERTS, "parallel.compile=on"),
}  # fmt: skip
CASES = [
    *(pytest.param(*case, id=case[0]) for case in QUICK.items()),
    *(pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW.items()),
]


def die_at(step: int) -> None:
    """For `before`: the process is killed when it has recorded a step, as soon as a checkpoint is complete: they are
    written while training goes on."""
    from calledshot.training.trainer import Trainer

    record = Trainer._record

    def recorded(self: Trainer, row: dict[str, Any], steps: int) -> None:
        record(self, row, steps)
        if row["step"] == step:
            while not self.run.complete_checkpoints():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._record = recorded


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(lab: Path, name: str, overrides: tuple[str, ...]) -> None:
    name = name.replace(" ", "-")
    command = ("train", "tiny.toml", *LENGTH, *overrides, "--name")
    whole, killed = (RunDirectory(lab / "runs" / one) for one in (name, f"{name}-killed"))
    ended = shot(lab, *command, whole.name)
    assert ended.code == 0, ended.said

    step = random.Random(name).randint(FIRST_CHECKPOINT + 1, STEPS - 2)
    ended = shot(lab, *command, killed.name, before=functools.partial(die_at, step))
    assert ended.code == -signal.SIGKILL, ended.said
    assert len(killed.metrics()) == step
    saved = killed.complete_checkpoints()[-1]
    assert FIRST_CHECKPOINT <= saved < step
    ended = shot(lab, *command, killed.name)
    assert ended.code == 0, ended.said
    assert re.search(rf"going on from step {saved}\b", ended.said)
    assert killed.incarnation == 2 and killed.state() == "done"

    assert len(curve(whole)) == STEPS
    assert curve(killed) == curve(whole)
    assert weights(killed, STEPS) == weights(whole, STEPS)
    assert held_out(killed) == held_out(whole)
