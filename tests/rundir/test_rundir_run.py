from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rundir_crash import crashes

from calledshot.recipe.errors import RunError, UsageError
from calledshot.rundir import RunDirectory, find_lab, read_metrics, resolve_checkpoint, resolve_run, runs, write_json
from calledshot.rundir import shim as shim_module

WRITER = """
import sys
from calledshot.rundir import RunDirectory
run = RunDirectory.open(sys.argv[1])
lock = run.lock()
run.begin_incarnation({}, sys.argv, "")
metrics = run.writer("metrics")
rows = run.metrics()
step = rows[-1]["step"] if rows else 0
print("ready", flush=True)
while True:
    step += 1
    metrics.append({"step": step, "loss": 1 / step, "padding": "x" * (step * 37 % 9000)})
    if step % 20 == 0:
        run.set_status(state="running", step=step)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_a_writer_killed_again_and_again_while_a_reader_reads(run: RunDirectory) -> None:
    for attempt in range(1, 6):
        child = start(WRITER, run.path)
        until = time.monotonic() + 0.15 + 0.01 * attempt
        seen = 0
        while time.monotonic() < until:
            steps = [row["step"] for row in run.metrics()]
            assert steps == list(range(1, len(steps) + 1))
            assert len(steps) >= seen
            seen = len(steps)
            assert run.state() == "running"
        kill(child)
        assert run.state() == "interrupted"
        assert run.incarnation == attempt
    steps = [row["step"] for row in read_metrics(run.path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 100
    assert {row["incarnation"] for row in run.metrics()} == {1, 2, 3, 4, 5}


def test_the_second_writer_is_told_who_holds_the_run(run: RunDirectory) -> None:
    child = start(WRITER, run.path)
    with pytest.raises(RunError, match=rf"runs/a: in use by process {child.pid} on .*python.*since 20"):
        run.lock()
    assert run.state() == "running"
    kill(child)
    lock = run.lock()
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        run.lock()
    lock.release()
    lock.release()
    with run.lock():
        pass


def test_a_forked_worker_that_outlives_its_killed_trainer_does_not_keep_the_lock(run: RunDirectory) -> None:
    code = """
import os, sys, time
from calledshot.rundir import RunDirectory
lock = RunDirectory.open(sys.argv[1]).lock()
if os.fork() == 0:
    lock.release()
    os.write(1, b"ready\\n")
    time.sleep(30)
    os._exit(0)
time.sleep(30)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    try:
        with pytest.raises(RunError):  # a child that releases does not release for its parent
            run.lock()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        run.lock().release()
    finally:
        os.killpg(child.pid, signal.SIGKILL)


def test_readers_looking_at_the_lock_do_not_keep_a_writer_out(run: RunDirectory) -> None:
    run.lock().release()
    code = """
import sys
from calledshot.rundir import RunDirectory
run = RunDirectory.open(sys.argv[1])
print("ready", flush=True)
while True:
    run.state()
"""
    readers = [start(code, run.path) for _ in range(2)]
    try:
        for _ in range(200):
            with run.lock():
                assert run.state() == "running"
            assert run.state() == "interrupted"
    finally:
        for reader in readers:
            kill(reader)


def test_state_is_what_is_true_now(run: RunDirectory) -> None:
    assert run.state() == "interrupted"
    with run.lock():
        assert run.begin_incarnation({"torch": "2"}, ["shot", "train", "my recipe"], "diff") == 1
        run.set_status(state="running", step=7, tokens=70, phase=2)
        assert run.state() == "running"
        run.set_status(state="done", message="finished")
        assert run.state() == "done"
    status = RunDirectory.open(run.path).status()
    assert (status["step"], status["tokens"], status["phase"], status["message"]) == (7, 70, 2, "finished")
    assert (status["incarnation"], status["pid"]) == (1, os.getpid())
    assert (run.incarnation_path(1) / "command").read_text() == "shot train 'my recipe'\n"
    assert (run.incarnation_path(1) / "logs").is_dir()


def test_without_a_lock_to_look_at_the_heartbeat_decides(run: RunDirectory) -> None:
    run.set_status(state="running", step=1)
    assert run.state() == "running"  # no lock file: a trainer without locks
    run.lock().release()
    assert run.state() == "interrupted"
    write_json(run.path / "status.json", {**run.status(), "host": "another"})
    assert run.state() == "running"  # a lock on a shared disk may not show here
    write_json(run.path / "status.json", {**run.status(), "heartbeat": "2026-01-31T12:00:00.000Z"})
    assert run.state() == "interrupted"


def test_a_copied_run_is_the_same_run(run: RunDirectory, tmp_path: Path) -> None:
    lock = run.lock()
    run.begin_incarnation({}, ["shot"], "")
    run.writer("metrics").append({"step": 1, "loss": 2.0})
    run.writer("validation").append({"step": 1, "source": "python", "loss": 2.1})
    run.rank_writer(3).append({"step": 1, "seconds": 0.5})
    run.save("probes", {"tokens": 5})
    run.note("good")
    with run.eval_writer("0001-held-out") as items:
        items.append({"item": 1})
    run.save_eval("0001-held-out", {"bits_per_byte": 1.2})
    with run.checkpoint_writer(1) as folder:
        (folder / "model.bin").write_text("weights")
    copy = RunDirectory.open(shutil.copytree(run.path, tmp_path / "elsewhere" / "b"))
    assert run.state() == "running"
    assert copy.state() == "interrupted"
    assert (copy.name, copy.identity, copy.recipe_toml()) == ("b", run.identity, "seed = 1\n")
    assert copy.metrics() == run.metrics()
    assert copy.standing_rows("validation") == run.standing_rows("validation")
    assert (copy.load("probes"), copy.load("summary")) == ({"tokens": 5}, {})
    assert (copy.evals(), len(copy.eval_rows("0001-held-out"))) == ({"0001-held-out": {"bits_per_byte": 1.2}}, 1)
    assert copy.labels() == run.labels()
    assert (copy.incarnation_path(1) / "ranks" / "3.jsonl").exists()
    found = copy.latest_checkpoint()
    assert found is not None
    assert found.path == copy.path / "checkpoints" / "step-0000001"
    with copy.lock():
        assert copy.begin_incarnation({}, ["shot"], "") == 2
    lock.release()


def test_validation_of_a_forgotten_future_is_left_out(run: RunDirectory) -> None:
    for steps in (range(1, 21), range(11, 13)):
        number = run.begin_incarnation({}, ["shot"])
        for step in steps:
            run.writer("metrics").append({"step": step})
            if step % 5 == 0:
                run.writer("validation").append({"step": step, "source": "python"})
    assert number == 2
    assert [row["step"] for row in run.standing_rows("validation")] == [5, 10]
    assert len(run.rows("validation")) == 4


def test_creation_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"

    def create() -> None:
        RunDirectory.create(path, recipe_toml="seed = 1\n", identity="x")

    for _ in crashes(create, prepare=lambda: shutil.rmtree(tmp_path / "runs", ignore_errors=True)):
        if path.exists():
            assert RunDirectory.open(path).identity == "x"
        else:
            assert runs(tmp_path) == []
    with pytest.raises(UsageError, match="is a run already: resume it"):
        create()
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(UsageError, match="notes: exists and is not a run"):
        RunDirectory.create(tmp_path / "runs" / "notes", recipe_toml="", identity="")
    assert os.listdir(tmp_path / "runs" / "notes") == ["todo.txt"]
    (tmp_path / "runs" / "empty").mkdir()
    RunDirectory.create(tmp_path / "runs" / "empty", recipe_toml="", identity="")
    assert [run.name for run in runs(tmp_path)] == ["a", "empty"]
    assert sorted(os.listdir(tmp_path / "runs")) == ["a", "empty", "notes"]


def test_runs_are_found_by_name_and_by_path(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab.toml").touch()
    deep = tmp_path / "recipes" / "deep"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert find_lab() == tmp_path
    assert resolve_run("a").path == run.path
    assert resolve_run("../../runs/a", tmp_path).path.resolve() == run.path
    RunDirectory.create(tmp_path / "runs" / "baseline", recipe_toml="", identity="")
    with pytest.raises(UsageError, match=r"no run 'baselin' in .*did you mean 'baseline'"):
        resolve_run("baselin")
    with pytest.raises(UsageError, match="deep: is not a run"):
        resolve_run(str(deep))
    with pytest.raises(UsageError, match="there is no run ''"):
        resolve_run("")
    with pytest.raises(UsageError, match="absent: does not exist"):
        RunDirectory.open(tmp_path / "absent")


def test_a_checkpoint_is_named_by_run_and_step(run: RunDirectory) -> None:
    lab = run.path.parent.parent
    with run.checkpoint_writer(20) as folder:
        (folder / "model.bin").write_text("weights")
    assert resolve_checkpoint("a", lab)[1] is None
    found, step = resolve_checkpoint("a@20", lab)
    assert (found.path, step) == (run.path, 20)
    with pytest.raises(UsageError, match="no complete checkpoint of step 30; there are: 20"):
        resolve_checkpoint("a@30", lab)


def test_outside_a_lab_the_current_folder_is_the_lab(tmp_path: Path) -> None:
    assert find_lab(tmp_path) == tmp_path
    assert runs(tmp_path) == []


def test_labels_are_the_users(run: RunDirectory) -> None:
    write_json(run.path / "labels.json", {"color": "red"})
    run.note("first")
    run.tag("keep", "best")
    run.tag("golden", remove=["keep"])
    run.archive()
    labels = run.labels()
    assert [note["text"] for note in labels["notes"]] == ["first"]
    assert (labels["tags"], labels["archived"], labels["color"]) == (["best", "golden"], True, "red")


def test_another_trainer_writes_a_run_with_the_copied_shim(tmp_path: Path) -> None:
    shutil.copy(shim_module.__file__, tmp_path / "theirs.py")
    path = tmp_path / "runs" / "theirs"
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
import theirs
run = theirs.Shim(sys.argv[2])
for step in range(int(sys.argv[3]), int(sys.argv[3]) + 10):
    run.step(step, loss=float("nan") if step == 3 else 2.0 / step)
run.step(step + 1, loss=0.1, checkpoint="saves/x")
print("ready", flush=True)
sys.stdin.readline()
run.end("failed", "disk on fire")
"""

    def trainer(first_step: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path), str(path), str(first_step)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    first = trainer(1)
    run = RunDirectory.open(path)
    assert run.state() == "running"
    with pytest.raises(RunError, match="in use by"):
        run.lock()
    kill(first)
    assert run.state() == "interrupted"
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')
    second = trainer(6)
    second.communicate("\n")
    assert run.state() == "failed"
    assert (run.status()["message"], run.status()["checkpoint"]) == ("disk on fire", "saves/x")
    merged = run.metrics()
    assert [(row["step"], row["incarnation"]) for row in merged] == [
        *((step, 1) for step in range(1, 6)),
        *((step, 2) for step in range(6, 17)),
    ]
    assert merged[2]["loss"] is None


def test_a_kill_while_an_evaluation_is_saved_leaves_none_that_looks_whole_and_is_not(run: RunDirectory) -> None:
    def save(answer: str, count: int) -> None:
        run.save_eval("held-out", {"answer": answer, "rows": count}, [{"answer": answer}] * count)

    def first() -> None:
        shutil.rmtree(run.path / "evals", ignore_errors=True)
        save("first", 3)

    seen = set()
    for _ in crashes(lambda: save("second", 2), first):
        summary = run.evals().get("held-out")
        if summary:
            assert run.eval_rows("held-out") == [{"answer": summary["answer"]}] * summary["rows"]
        seen.add(summary and summary["answer"])
        for left in (run.path / "evals").glob(".*"):
            os.utime(left, (0, 0))
            seen.add("leftover")
        run.lock().release()
        assert not list((run.path / "evals").glob(".*"))
    assert seen == {"first", None, "second", "leftover"}


def test_reading_and_writing_runs_needs_nothing_but_the_standard_library() -> None:
    code = "import sys, calledshot.rundir; print({m for m in ('numpy', 'torch', 'scipy') if m in sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
