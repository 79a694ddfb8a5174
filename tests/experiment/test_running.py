"""Running a suite, with a trainer that takes no time: all of it, again, beside each other, and interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from planted import suite

from calledshot.experiment import make_plan, make_report, room, run_suite
from calledshot.experiment.plan import bytes_needed
from calledshot.experiment.running import measurements
from calledshot.recipe import UsageError
from calledshot.rundir import RunDirectory, read_jsonl, runs

TRAINER = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
ARMS = ('name = "base"', 'name = "good"\nset.model.kv_heads = 1', 'name = "other"\nset.model.kv_heads = 4')
FAILS = 'name = "fails"\nset.model.tied_embeddings = true'


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_everything_is_trained_measured_and_not_done_again(lab):
    asked = suite(*ARMS, more='evals = [{ name = "more", arguments = ["--more"] }]\n')
    said = []
    ran = run_suite(asked, lab, parallel=4, speed=False, tell=said.append, command=TRAINER)
    assert ran.exit_code == 0
    assert [run.state() for run in runs(lab)] == ["done"] * 9
    assert len(lines(lab / "started")) == 9
    starts = [text.removesuffix(": starts") for text in said if text.endswith(": starts")]
    assert starts[:4] == ["planted-base-S-s0", "planted-good-S-s0", "planted-other-S-s0", "planted-base-S-s1"]
    known = measurements(asked, lab)
    # The attempt that ended after three tokens says nothing about speed; of the others the quickest counts.
    assert known["planted-good-S-s0"] == {"more": 1.75, "decode": 102.0}
    assert known["planted-good-S-s1"] == {"more": 1.75}
    report = make_report(ran.plan, lab)
    assert report.analysis.effect("good", "S").verdict == "better"
    assert report.analysis.effect("other", "S").verdict == "inside the noise"
    assert report.row("good", "S").decode == 102.0

    said.clear()
    assert run_suite(asked, lab, speed=False, tell=said.append, command=TRAINER).exit_code == 0
    assert len(lines(lab / "started")) == 9
    assert len(said) == 1 and "9 runs, 9 of them done" in said[0]


def test_speeds_are_measured_alone_in_turns_and_once(lab, monkeypatch):
    monkeypatch.setattr("calledshot.experiment.running.machine.usable_cores", lambda: 8)
    asked = suite(*ARMS[:2], sizes=(("S", 64), ("M", 128)), seeds="[0]")
    run_suite(asked, lab, parallel=4, speed=False, command=TRAINER)
    before = make_report(make_plan(asked, lab), lab)
    assert before.clocks["S"].startswith("Speeds and seconds are those of the runs themselves")
    path = lab / "runs" / "planted-good-S-s0" / "summary.json"  # trained beside what took half of the time
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokens_per_second": 2500.0}))
    assert make_report(make_plan(asked, lab), lab).row("good", "S").tokens_per_second == 2500
    probes = {"machines": {"cpu": {"dtype": "float32", "compile": True, "threads": 2, "micro_tokens": 512}}}
    (lab / "runs" / "planted-good-S-s0" / "probes.json").write_text(json.dumps(probes))

    already = len(lines(lab / "started"))
    ran = run_suite(asked, lab, parallel=4, command=TRAINER)
    begun = [name for name, *_ in lines(lab / "started")][already:]
    rounds = [f"planted-{arm}-{size}-speed-{place}" for size in "SM" for place in (1, 2) for arm in ("base", "good")]
    assert begun == rounds
    ends = {name: (float(at), threads) for name, at, threads in lines(lab / "ended")}
    begins = {name: float(at) for name, _, at in lines(lab / "started")}
    assert all(ends[a][0] <= begins[b] for a, b in pairwise(rounds)) and {ends[a][1] for a in rounds} == {"8"}
    one = RunDirectory(lab / "runs" / "planted-good-S-speed-1")
    recipe = tomllib.loads(one.recipe_toml())
    assert recipe["duration"]["tokens"] == 12 * recipe["batch"]["tokens"]
    assert (recipe["parallel"]["compile"], recipe["parallel"]["dtype"]) == ("on", "float32")  # as the run that counts
    assert one.labels()["archived"] and not one.folder.exists()
    assert RunDirectory(lab / "runs" / "planted-good-S-s0").folder.exists()

    report = make_report(ran.plan, lab)
    assert report.row("good", "S").tokens_per_second == pytest.approx(5000)  # the fake's speed is that of its layers
    assert report.row("good", "S").seconds == pytest.approx(report.row("good", "S").tokens / 5000)
    assert report.clocks["S"].startswith("Speeds and seconds are those of 2 short runs of each arm")
    assert {len(one.clocks) for one in report.runs} == {2}
    assert run_suite(asked, lab, command=TRAINER).exit_code == 0
    assert len(lines(lab / "started")) == already + len(rounds)

    (lab / "runs" / "planted-good-M-speed-2" / "summary.json").unlink()
    report = make_report(make_plan(asked, lab), lab)  # what is known of two arms is not held against a third's own
    assert {one.size for one in report.runs if one.alone} == {"S"}


def test_runs_beside_each_other_share_the_cores(lab, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    monkeypatch.setattr("calledshot.experiment.running.machine.usable_cores", lambda: 8)
    asked = suite(*ARMS[:2], seeds="[0, 1]")
    assert run_suite(asked, lab, parallel=2, speed=False, command=TRAINER).exit_code == 0
    begun = {name: float(at) for name, _, at in lines(lab / "started")}
    over = {name: float(at) for name, at, _ in lines(lab / "ended")}
    assert {threads for *_, threads in lines(lab / "ended")} == {"4"}
    beside = [sum(begun[other] < end and over[other] > begun[name] for other in begun) for name, end in over.items()]
    assert max(beside) >= 2
    instants = sorted(begun.values())
    assert all(sum(begun[name] <= at < over[name] for name in begun) <= 2 for at in instants)


def test_a_failed_arm_stops_nobody_and_is_tried_again_only_when_asked(lab, monkeypatch):
    asked = suite(*ARMS[:2], FAILS)
    said = []
    ran = run_suite(asked, lab, parallel=2, speed=False, tell=said.append, command=TRAINER)
    assert ran.exit_code == 1
    states = {run.name: run.state() for run in runs(lab)}
    assert sum(state == "done" for state in states.values()) == 6
    assert all(state == "failed" for name, state in states.items() if "fails" in name)
    assert any("planted-fails-S-s0: failed after" in text and "the weights are not finite" in text for text in said)
    report = make_report(ran.plan, lab)
    assert report.row("fails", "S").states == {"failed": 3}
    assert [remark.text for remark in report.remarks if remark.kind == "failed"] == ["3 of its 3 runs failed"]
    assert all("the weights are not finite" in one.message for one in report.runs if one.arm == "fails")

    monkeypatch.setenv("FAKE_MENDED", "1")
    assert run_suite(asked, lab, speed=False, command=TRAINER).exit_code == 1
    assert len(lines(lab / "started")) == 9
    assert run_suite(asked, lab, speed=False, command=TRAINER, retry=True).exit_code == 0
    assert len(lines(lab / "started")) == 12


def test_some_arms_and_sizes_alone(lab):
    asked = suite(*ARMS, sizes=(("S", 64), ("M", 128)), seeds="[0]")
    assert run_suite(asked, lab, arms=["good"], sizes=["M"], command=TRAINER).exit_code == 0
    names = ["planted-good-M-s0", "planted-good-M-speed-1", "planted-good-M-speed-2"]
    assert [run.name for run in runs(lab)] == names


def test_a_run_of_another_recipe_is_not_touched(lab):
    asked = suite(*ARMS[:2])
    run_suite(asked, lab, speed=False, command=TRAINER)
    longer = replace(asked, sizes=(replace(asked.sizes[0], tokens=200_000),))
    with pytest.raises(UsageError) as error:
        run_suite(longer, lab, command=TRAINER)
    assert "planted-base-S-s0: is a run of another recipe (duration.tokens 100000 -> 200000)" in str(error.value)
    assert len(lines(lab / "started")) == 6


def test_speeds_are_measured_first_where_seconds_are_matched(lab):
    slow = 'name = "slow"\nset.model.layers = 4\nmatch = "seconds"'
    ran = run_suite(suite(ARMS[0], slow, seeds="[0]"), lab, command=TRAINER)
    assert ran.exit_code == 0
    names = [name for name, *_ in lines(lab / "started")]
    assert names[:2] == ["planted-base-S-calibration", "planted-slow-S-calibration"]
    assert names[4:] == ["planted-base-S-speed-2", "planted-slow-S-speed-2"]  # the calibration is the first
    tokens = {arm: ran.plan.cells[arm, "S"].cost.tokens for arm in ("base", "slow")}
    assert tokens["slow"] == pytest.approx(tokens["base"] / 2, rel=0.01)  # the fake's speed is that of its layers
    assert RunDirectory(lab / "runs" / names[0]).labels()["archived"]
    report = make_report(ran.plan, lab)
    assert report.row("slow", "S").seconds == pytest.approx(report.row("base", "S").seconds, rel=0.01)


def test_an_arm_may_begin_with_what_another_has_become(lab):
    half = 'name = "half"\nmatch = "none"\nat.S.duration.tokens = 50_000'
    grown = (
        'name = "grown"\nstart = "half"\nconvert = ["upcycle", "--experts", "4"]\nmatch = "flops"\n'
        "set.model.balance_weight = 0.02"
    )
    asked = suite(ARMS[0], half, grown, seeds="[0, 1]")
    ran = run_suite(asked, lab, parallel=4, speed=False, command=TRAINER)
    assert ran.exit_code == 0
    start = RunDirectory(lab / "runs" / "planted-grown-S-s1-start")
    assert start.status()["made"] == ["upcycle", "planted-half-S-s1", "--experts", "4", "--name", start.name]
    assert start.labels()["archived"]
    assert RunDirectory(lab / "runs" / "planted-grown-S-s1").load("lineage") == {"parent": f"{start.name}@0"}
    cells = {arm: ran.plan.cells[arm, "S"] for arm in ("base", "half", "grown")}
    # Half of the budget was spent by the dense run, and the rest buys fewer tokens of the sparse one.
    assert cells["grown"].flops == pytest.approx(cells["base"].flops, rel=0.01)
    assert cells["grown"].cost.tokens < cells["half"].cost.tokens
    report = make_report(ran.plan, lab)
    rows = {row.arm: row for row in report.rows}
    assert rows["grown"].tokens == pytest.approx(
        sum(one.cost.tokens for one in (cells["half"], cells["grown"])), rel=0.01
    )
    assert rows["grown"].seconds > rows["half"].seconds
    assert run_suite(asked, lab, speed=False, command=TRAINER).exit_code == 0
    assert len(lines(lab / "started")) == 6
    ran = run_suite(asked, lab, command=TRAINER)
    assert not RunDirectory(lab / "runs" / "planted-grown-S-speed-1").load("lineage")  # its speed is that of its shape
    grown = next(one for one in make_report(ran.plan, lab).runs if one.arm == "grown")
    assert sum(grown.clocks) / 2 == pytest.approx(grown.seconds) and grown.seconds > rows["half"].seconds


def test_runs_may_be_changed_before_they_are_asked(lab):
    more = 'evals = [{ name = "far", convert = ["extend", "--context", "512"], arms = ["good"] }]\n'
    asked = suite(*ARMS[:2], more=more, seeds="[0]")
    assert run_suite(asked, lab, parallel=2, speed=False, command=TRAINER).exit_code == 0
    known = measurements(asked, lab)
    assert known["planted-good-S-s0"]["far"] == 2.75
    assert "far" not in known["planted-base-S-s0"]
    assert RunDirectory(lab / "runs" / "planted-good-S-s0-far").labels()["archived"]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from planted import suite
from test_running import ARMS, TRAINER
from calledshot.experiment import run_suite
print(run_suite(suite(*ARMS), Path.cwd(), parallel=2, tell=print, command=TRAINER).exit_code)
"""


def test_ctrl_c_stops_the_runs_after_a_step_and_the_same_command_goes_on(lab):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "FAKE_SECONDS": "0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while len(read_jsonl(lab / "runs" / "planted-base-S-s0" / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert output.splitlines()[-1] == "130"
    assert "once more stops them at once" in errors
    states = {run.name: run.state() for run in runs(lab)}
    assert states == {"planted-base-S-s0": "interrupted", "planted-good-S-s0": "interrupted"}

    assert run_suite(suite(*ARMS), lab, parallel=4, speed=False, command=TRAINER).exit_code == 0
    begun = {}
    for name, step, _ in lines(lab / "started"):
        begun.setdefault(name, []).append(int(step))
    assert begun["planted-base-S-s0"][0] == 0 and begun["planted-base-S-s0"][1] >= 3
    assert {run.state() for run in runs(lab)} == {"done"}


def test_as_many_fit_as_cores_and_memory_allow(lab, monkeypatch):
    planned = make_plan(suite(*ARMS), lab)
    needed = bytes_needed(planned.runs[0])
    for cores, memory, gpus, expected in ((8, 3.5, 0, 3), (2, 100, 0, 2), (8, 0.1, 0, 1), (8, 0.1, 4, 4)):
        monkeypatch.setattr("calledshot.experiment.plan.machine.usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr("calledshot.experiment.plan.machine.gpus", lambda gpus=gpus: [None] * gpus)
        described = {"memory": {"available_bytes": memory * needed / 0.9}}
        monkeypatch.setattr("calledshot.experiment.plan.machine.describe", lambda described=described: described)
        assert room(planned.runs) == expected
    slow = 'name = "slow"\nset.model.layers = 4\nmatch = "seconds"'
    assert room(make_plan(suite(ARMS[0], slow), lab).calibrations) == 1


def test_a_finished_run_of_another_suite_stands_for_the_same_recipe_and_seed(lab):
    run_suite(suite(*ARMS), lab, parallel=4, speed=False, command=TRAINER)
    table = [one.path.name for one in runs(lab)]
    # Another suite: its baseline under another name, one arm of the first, one that is new.
    other = replace(suite('name = "grouped"', *ARMS[2:], 'name = "wide"\nset.model.softcap = 30.0'), name="second")
    said = []
    ran = run_suite(other, lab, parallel=4, speed=False, tell=said.append, command=TRAINER)
    assert "9 runs, 6 of them done, 6 of these by other suites" in said[0]
    assert sorted(one.path.name for one in runs(lab)) == sorted([*table, *(f"second-wide-S-s{n}" for n in range(3))])
    report = make_report(ran.plan, lab)
    assert report.row("grouped", "S").loss == pytest.approx(1.501)
    assert report.analysis.effect("other", "S").seeds == (3, 3)


@pytest.mark.parametrize("spoilt", ["seed", "asked otherwise", "a fork", "batches left out", "not done"])
def test_what_is_not_the_same_run_stands_for_nothing(lab, spoilt):
    first = suite('name = "base"', seeds="[0]")
    run_suite(first, lab, speed=False, command=TRAINER)
    path = lab / "runs" / "planted-base-S-s0"
    seeds, more = "[0]", ""
    if spoilt == "seed":
        seeds = "[1]"
    elif spoilt == "asked otherwise":
        more = 'set.parallel.dtype = "float32"\n'
    elif spoilt == "a fork":
        (path / "lineage.json").write_text('{"parent": "other", "step": 3}')
    elif spoilt == "batches left out":
        (path / "skips.jsonl").write_text('{"first": 3, "last": 4}\n')
    else:
        status = json.loads((path / "status.json").read_text())
        (path / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    again = replace(suite('name = "base"', seeds=seeds, more=more), name="second")
    assert make_plan(again, lab).twins == {}
    assert make_plan(first, lab).twins == {}  # its own name is its own run


def test_a_question_that_cannot_be_asked_fails_the_suite(lab):
    more = 'evals = [{ name = "odd", arguments = ["--predict", "nonsense"] }]\njudge = "odd"\n'
    asked, said = suite(ARMS[0], ARMS[1], seeds="[0]", more=more), []
    ran = run_suite(asked, lab, speed=False, tell=said.append, command=TRAINER)
    assert ran.exit_code == 1
    assert sum("there is no such question" in line for line in said) == 2
    assert make_report(ran.plan, lab).analysis.effect("good", "S").reason == "no result of good"


def test_a_cells_speed_is_measured_as_most_of_its_runs_computed(lab):
    asked = suite(ARMS[0], seeds="[0, 1, 2]")
    run_suite(asked, lab, speed=False, command=TRAINER)
    for seed, dtype in enumerate(("float32", "bfloat16", "bfloat16")):  # the first was disturbed when it probed
        probes = {"machines": {"cpu": {"dtype": dtype, "compile": True, "threads": 1, "micro_tokens": 512}}}
        (lab / "runs" / f"planted-base-S-s{seed}" / "probes.json").write_text(json.dumps(probes))
    run_suite(asked, lab, command=TRAINER)
    recipe = tomllib.loads(RunDirectory(lab / "runs" / "planted-base-S-speed-1").recipe_toml())
    assert recipe["parallel"]["dtype"] == "bfloat16"
