"""Several ranks train what one rank trains, and go on with what any number of ranks has saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import curve, gang, shot, start_gang, stop_at

from calledshot.recipe import Layout
from calledshot.rundir import RunDirectory
from calledshot.training.pieces import Piece
from calledshot.training.slots import divide
from calledshot.training.world import Place

MODEL = ("model.heads=4", "model.kv_heads=2", "model.width=64", "parallel.micro_tokens=32", "duration.tokens=6400")
"""Fifty steps of four rows, one at a time: three ranks take one, one and two of them."""
OPTIMIZERS = {"muon": (), "adamw": ("optimizer.name=adamw", "optimizer.learning_rate=0.003")}
DENSE = {
    "two replicas": (2, ()),
    "three replicas": (3, ()),
    "two shards": (2, ("parallel.shard=2",)),
    "three shards": (3, ("parallel.shard=3",)),
    "two by two": (4, ("parallel.replicate=2", "parallel.shard=2")),
    "tensor": (2, ("parallel.tensor=2",)),
    "tensor and shards": (4, ("parallel.tensor=2", "parallel.shard=2")),
    "context": (2, ("parallel.context=2",)),
}
EXPERTS = ("model.experts=4", "model.top_k=2", "optimizer.learning_rate=0.0005", "optimizer.clip=0")
"""A choice of experts that rounding turns over shows in the losses of later steps: at a high rate soon, and sooner with
clipping, as the norm of one rank's gradients is itself rounded at 1e-5."""
SPARSE = {
    "two replicas": (2, ()),
    "two shards": (2, ("parallel.shard=2",)),
    "experts": (2, ("parallel.expert=2",)),
    "context": (2, ("parallel.context=2",)),
    "experts and shards": (4, ("parallel.expert=2", "parallel.shard=4")),
}
QUICK = {("three shards", "adamw"), ("two replicas", "muon"), ("tensor", "muon"), ("context", "muon")}


def train(lab: Path, name: str, ranks: int, *overrides: str, **more: Callable[[], None]) -> RunDirectory:
    """A run of the tiny recipe's model above, to its end."""
    command = ("train", "tiny.toml", "--name", name, *MODEL, *overrides)
    ended = gang(lab, ranks, *command, **more) if ranks > 1 else [shot(lab, *command, **more)]
    assert all(one.code == ended[0].code for one in ended), [one.said for one in ended]
    assert ended[0].code in (0, 130, 143), ended[0].said
    return RunDirectory(lab / "runs" / name)


@pytest.fixture(scope="module")
def alone(lab: Path) -> Callable[..., RunDirectory]:
    """`alone(OPTIMIZER, OVERRIDES...)` is the run of one rank."""
    known: dict[tuple[str, ...], RunDirectory] = {}

    def run(optimizer: str, *overrides: str) -> RunDirectory:
        key = (optimizer, *overrides)
        if key not in known:
            known[key] = train(lab, f"alone-{len(known)}", 1, *OPTIMIZERS[optimizer], *overrides)
        return known[key]

    return run


def losses(run: RunDirectory) -> list[float]:
    return [row["loss"] for row in run.metrics()]


def marked(layouts: dict[str, tuple[int, tuple[str, ...]]]) -> list[object]:
    """The layouts with each optimizer, all but a few slow."""
    return [
        pytest.param(layout, optimizer, marks=() if (layout, optimizer) in QUICK else pytest.mark.slow)
        for layout in layouts
        for optimizer in OPTIMIZERS
    ]


@pytest.mark.parametrize(("layout", "optimizer"), marked(DENSE))
def test_ranks_train_what_one_rank_trains(
    lab: Path, alone: Callable[..., RunDirectory], layout: str, optimizer: str
) -> None:
    ranks, overrides = DENSE[layout]
    run = train(lab, f"{layout}-{optimizer}".replace(" ", "-"), ranks, *OPTIMIZERS[optimizer], *overrides)
    expected = alone(optimizer)
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)
    assert [row["loss"] for row in run.rows("validation")] == pytest.approx(
        [row["loss"] for row in expected.rows("validation")], rel=1e-4
    )
    for rank in range(ranks):
        assert len((run.incarnation_path() / "ranks" / f"{rank}.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize(("layout", "optimizer"), [*marked(SPARSE), pytest.param("experts", "muon", id="quick")])
def test_ranks_train_the_experts_that_one_rank_trains(
    lab: Path, alone: Callable[..., RunDirectory], layout: str, optimizer: str
) -> None:
    ranks, overrides = SPARSE[layout]
    run = train(
        lab, f"sparse-{layout}-{optimizer}".replace(" ", "-"), ranks, *OPTIMIZERS[optimizer], *EXPERTS, *overrides
    )
    expected = alone(optimizer, *EXPERTS)
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)
    shares = [[row["experts"]["entropy"] for row in each.metrics()] for each in (run, expected)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(2, ()), pytest.param(3, ("parallel.shard=3",), marks=pytest.mark.slow)]
)
def test_the_same_ranks_give_the_same_bits_also_after_an_interruption(
    lab: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    first = train(lab, f"bits-{ranks}", ranks, *overrides)
    second = train(lab, f"bits-{ranks}-again", ranks, *overrides, before=stop_first_rank_at_20)
    assert second.state() == "interrupted"
    train(lab, f"bits-{ranks}-again", ranks, *overrides)
    assert curve(first) == curve(second)
    for name in os.listdir(first.checkpoint_path(50)):
        if name.endswith(".safetensors"):
            both = [(run.checkpoint_path(50) / name).read_bytes() for run in (first, second)]
            assert both[0] == both[1], name


def stop_first_rank_at_20() -> None:
    """For `before`."""
    if os.environ["RANK"] == "0":
        stop_at(20)


def stop_last_rank_at_20() -> None:
    """For `before`."""
    if int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        stop_at(20)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, ("parallel.shard=2",)), (1, ("parallel.shard=0",))),
        pytest.param((3, ()), (2, ("parallel.shard=2",)), marks=pytest.mark.slow),
        pytest.param(
            (2, ("parallel.shard=2",)), (2, ("parallel.shard=0", "parallel.tensor=2")), marks=pytest.mark.slow
        ),
        pytest.param(
            (2, ("parallel.tensor=2",)), (3, ("parallel.shard=3", "parallel.tensor=1")), marks=pytest.mark.slow
        ),
    ],
)
def test_other_ranks_go_on(
    lab: Path,
    alone: Callable[..., RunDirectory],
    before: tuple[int, tuple[str, ...]],
    after: tuple[int, tuple[str, ...]],
) -> None:
    name = f"elastic-{before[0]}-{after[0]}-{len(before[1])}-{len(after[1])}-{len(''.join(after[1]))}"
    run = train(lab, name, before[0], *before[1], before=stop_last_rank_at_20)
    assert run.state() == "interrupted" and run.latest() == run.status()["step"]
    train(lab, name, after[0], *after[1])
    assert losses(run) == pytest.approx(losses(alone("muon")), rel=1e-3)
    assert len(run.metrics()) == 50


def test_a_killed_rank_ends_the_others_and_loses_nothing_that_was_saved(lab: Path) -> None:
    command = ("train", "tiny.toml", "--name", "orphans", *MODEL, "checkpoint.every_steps=10", "duration.tokens=1M")
    ranks = start_gang(lab, 2, *command)
    run = RunDirectory(lab / "runs" / "orphans")
    assert ranks[0].wait_for(lambda: run.latest() == 20), ranks[0].said
    ranks[1].signal(signal.SIGKILL)
    first, second = (rank.end() for rank in ranks)
    assert second.code == -signal.SIGKILL
    assert first.code == 1 and "another rank ended first" in first.complaint
    assert run.state() == "failed"
    step = run.latest()
    assert step is not None and step >= 20
    length = f"duration.tokens={128 * (step + 5)}"
    ended = gang(lab, 3, "train", "tiny.toml", "--name", "orphan", "--from", "orphans", *MODEL, length)
    assert [one.code for one in ended] == [0, 0, 0], ended[0].said


def test_what_is_mistyped_ends_all_ranks_with_one_message(lab: Path) -> None:
    ended = gang(lab, 2, "train", "tiny.toml", "--name", "odd", "parallel.shard=3")
    assert [one.code for one in ended] == [2, 2]
    assert "parallel.shard = 3 does not divide the 2 ranks" in ended[0].complaint
    assert ended[1].said == ""
    assert not (lab / "runs" / "odd").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("calledshot",), ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
)
def test_launchers(lab: Path, launcher: tuple[str, ...]) -> None:
    name = f"launched-{len(launcher)}"
    program = ["-m", *launcher] if len(launcher) == 1 else ["-m", *launcher, "-m", "calledshot"]
    more = ("--ranks", "2") if len(launcher) == 1 else ()
    command = [sys.executable, *program, "train", "tiny.toml", "--name", name, *more]
    done = subprocess.run(command, cwd=lab, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert RunDirectory(lab / "runs" / name).state() == "done"
    if len(launcher) > 1:
        return
    more = ("--ranks", "2", "--name", "long", "duration.tokens=100M", "checkpoint.every_steps=1000")
    long = [sys.executable, "-m", "calledshot", "train", "tiny.toml", *more]
    process = subprocess.Popen(long, cwd=lab, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("step"))
    process.send_signal(signal.SIGINT)
    assert "finishing the step and saving" in process.stderr.read()
    assert process.wait() == 130
    run = RunDirectory(lab / "runs" / "long")
    assert run.state() == "interrupted" and run.latest() == run.status()["step"]


def test_places_are_those_of_torchrun_and_of_slurm() -> None:
    assert Place.of({}) == Place(0, 1, 0, 1)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Place.of(torchrun) == Place(5, 8, 1, 4)
    slurm = {
        "SLURM_PROCID": "9",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }
    assert Place.of(slurm) == Place(9, 16, 1, 8)
    # A shell of `salloc`, or a batch script, is no step with tasks of its own.
    assert Place.of({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}) == Place(0, 1, 0, 1)


def test_rows_are_divided_evenly_and_matrices_are_not_cut() -> None:
    shapes = {
        "embedding_VD": (768, 64),
        "blocks.0.qkv_KXCD": (2, 4, 16, 64),
        "blocks.0.out_DHC": (64, 64),
        "norm_D": (64,),
    }
    parts = {name: Piece.cut(shape) for name, shape in shapes.items()}
    for ranks in (2, 3, 5):
        cuts = divide(parts, ranks)
        for name, part in parts.items():
            assert cuts[name][0][0] == 0 and cuts[name][-1][1] == part.height
            assert all(before[1] == after[0] for before, after in zip(cuts[name], cuts[name][1:], strict=False))
        assert all(start % 16 == 0 and stop % 16 == 0 for start, stop in cuts["blocks.0.qkv_KXCD"])
        assert all(start % 64 == 0 and stop % 64 == 0 for start, stop in cuts["blocks.0.out_DHC"])
        rest = [
            sum((cuts[n][r][1] - cuts[n][r][0]) * parts[n].width for n in ("embedding_VD", "norm_D"))
            for r in range(ranks)
        ]
        assert max(rest) - min(rest) <= 2 * 64
    assert Layout(2, 3, 1, 2).data == 6


def test_an_optimizer_of_ones_own_goes_on_from_its_state(lab: Path) -> None:
    (lab / "sign.py").write_text(
        "import torch\n\n\nclass Sign(torch.optim.Optimizer):\n"
        "    def __init__(self, groups, lr):\n        super().__init__(groups, {'lr': lr})\n\n"
        "    @torch.no_grad()\n    def step(self):\n        for group in self.param_groups:\n"
        "            for p in group['params']:\n"
        "                held = self.state[p].setdefault('held', torch.zeros_like(p))\n"
        "                held.lerp_(p.grad, 0.1)\n                p.sub_(held.sign(), alpha=group['lr'] * 0.05)\n"
    )
    own = ("optimizer.name=sign.py:Sign", "optimizer.learning_rate=0.01")
    alone = train(lab, "sign-alone", 1, *own)
    ranks = train(lab, "sign-ranks", 2, *own, before=stop_first_rank_at_20)
    assert ranks.state() == "interrupted"
    train(lab, "sign-ranks", 3, *own)
    assert losses(ranks) == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.parametrize("layout", ["two shards", pytest.param("tensor", marks=pytest.mark.slow)])
def test_samples_and_norms_are_those_of_one_rank(lab: Path, layout: str) -> None:
    more = ("evals.prompts=['ba']", "evals.sample_tokens=8", "evals.norms_every_steps=20")
    ranks, overrides = DENSE[layout]
    runs = [train(lab, f"said-{layout}-{n}".replace(" ", "-"), n, *more, *o) for n, o in ((1, ()), (ranks, overrides))]
    said = [[row["text"] for row in run.rows("samples")] for run in runs]
    assert said[0] == said[1] and said[0]
    norms = [[row["norms"] for row in run.metrics() if "norms" in row] for run in runs]
    assert len(norms[0]) == 2
    for one, other in zip(*norms, strict=True):
        for kind in ("gradient", "update"):
            assert other[kind] == pytest.approx(one[kind], rel=1e-3, abs=1e-6)


RAMP = ("batch.ramp.0.tokens=64", "batch.ramp.0.until=0.1", "batch.ramp.1.tokens=96", "batch.ramp.1.until=0.4")
"""Two, three and four rows: ten steps, twenty, and thirty."""


def test_batches_that_grow_are_the_same_on_other_ranks_and_after_an_interruption(lab: Path) -> None:
    alone = train(lab, "ramp-alone", 1, *RAMP)
    rows = alone.metrics()
    sizes = [after["tokens"] - before["tokens"] for before, after in zip([{"tokens": 0}, *rows], rows, strict=False)]
    assert sizes == [64] * 10 + [96] * 20 + [128] * 30
    assert alone.status()["total_tokens"] == 6400 and alone.load("summary")["tokens"] == 6400
    assert alone.load("summary")["goodput"] < 1

    again = train(lab, "ramp-again", 1, *RAMP, before=stop_at_20_alone)
    assert again.state() == "interrupted"
    train(lab, "ramp-again", 1, *RAMP)
    assert curve(again) == curve(alone)

    elastic = train(lab, "ramp-elastic", 2, *RAMP, before=stop_last_rank_at_20)
    assert elastic.state() == "interrupted"
    train(lab, "ramp-elastic", 1, *RAMP)
    assert losses(elastic) == pytest.approx(losses(alone), rel=1e-4)


def stop_at_20_alone() -> None:
    """For `before`."""
    stop_at(20)
