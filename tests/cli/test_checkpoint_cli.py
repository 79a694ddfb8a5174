"""`shot checkpoint` on a run with checkpoints made to order: two of one rank, one of two."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calledshot.cli import main
from calledshot.data import Tokenizer
from calledshot.model import Decoder
from calledshot.recipe import from_dict, identity, to_toml
from calledshot.rundir import JsonLines, RunDirectory
from calledshot.training import load_model, state
from calledshot.training.pieces import Piece
from calledshot.training.saving import Saver
from calledshot.training.state import Counters

RECIPE = from_dict(
    {
        "model": {"layers": 1, "width": 32, "heads": 2, "vocabulary": 576, "context": 16},
        "batch": {"tokens": 16},
        "duration": {"tokens": 64},
        "checkpoint": {"keep": 1, "keep_best": 1, "every_steps": 10},
    }
)
SENTENCES = ["The quick brown fox jumps over the lazy dog."] * 9


def weights(step: int) -> dict[str, torch.Tensor]:
    model = Decoder(RECIPE.model)
    model.initialise(torch.Generator().manual_seed(step))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def halves(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, tuple[torch.Tensor, Piece]]:
    """Every second of the rows of each tensor's two halves."""
    found = {}
    for name, tensor in tensors.items():
        whole = Piece.whole(tuple(tensor.shape))
        border = whole.height // 2
        piece = whole.rows(0, border) if rank == 0 else whole.rows(border, whole.height)
        found[name] = (tensor.reshape(whole.height, whole.width)[piece.start : piece.stop], piece)
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lab = tmp_path_factory.mktemp("original")
    run = RunDirectory.create(lab / "runs" / "a", recipe_toml=to_toml(RECIPE), identity=identity(RECIPE))
    run.begin_incarnation({}, [])
    (run.path / "tokenizer.json").write_text(Tokenizer.train(SENTENCES, 576).to_json(), encoding="utf-8")
    for step in (10, 20):
        state.save(run, Counters(step=step, tokens=16 * step), weights(step), {"embedding_VD.first": torch.ones(3)})
    barrier, said = threading.Barrier(2), [b"", b""]

    def rank(number: int) -> None:
        def gather(content: bytes) -> list[bytes]:
            said[number] = content
            barrier.wait()
            everyone = list(said)
            barrier.wait()
            return everyone

        own = run if number == 0 else RunDirectory(run.path)
        saver = Saver(own, number, 2, replace(RECIPE.checkpoint, keep=9), gather=gather)
        moments = {f"{name}.first": tensor for name, tensor in weights(31).items()}
        saver.save(Counters(step=30, tokens=480), halves(weights(30), number), halves(moments, number))
        saver.close()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step, bits in ((10, 1.25), (20, 2.5)):
        run.writer("validation").append({"step": step, "source": "s", "bits_per_byte": bits})
    run.set_status(state="interrupted", step=30)
    run.close()
    return lab


@pytest.fixture
def lab(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["checkpoint", *arguments]) == code, capsys.readouterr()
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.out + captured.err


def test_list_says_what_there_is_and_why_it_stays(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(capsys, "list", "a", "--json"))
    assert [(row["step"], row["files"], row["latest"], row["bits_per_byte"], row["kept"]) for row in rows] == [
        (10, 3, False, 1.25, "best 1"),
        (20, 3, False, 2.5, None),
        (30, 6, True, None, "newest 1"),
    ]
    assert all(row["fault"] is None and row["verified"] and row["bytes"] > 80_000 for row in rows)
    lines = said(capsys, "list", "a").splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("goes with the next save")
    (lab / "runs" / "a" / "checkpoints" / "step-0000020" / "state.json").write_text("{}")
    assert main(["checkpoint", "list", "a"]) == 0
    captured = capsys.readouterr()
    assert "damaged" in captured.out
    assert "state.json: has 2 bytes" in captured.err


def test_verify_names_what_is_damaged(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", "a") == "step 10  whole\nstep 20  whole\nstep 30  whole\n"
    file = lab / "runs" / "a" / "checkpoints" / "step-0000030" / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert said(capsys, "verify", "a@20") == "step 20  whole\n"
    assert "model-00001-of-00002.safetensors: is damaged" in said(capsys, "verify", "a@30", code=1)
    (faulty,) = [row for row in json.loads(said(capsys, "verify", "a", "--json", code=1)) if row["fault"]]
    assert faulty["step"] == 30
    assert "has no checkpoint of step 11; there are: 10, 20, 30" in said(capsys, "verify", "a@11", code=2)


def test_prune_deletes_by_the_rule_and_says_first_what(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(lab / "runs" / "a")
    assert said(capsys, "prune", "a", "--dry-run").startswith("20 would be deleted (")
    assert run.complete_checkpoints() == [10, 20, 30]
    dry = json.loads(said(capsys, "prune", "a", "--dry-run", "--json", "checkpoint.keep_best=0"))
    assert dry["would_delete"] == [10, 20]
    assert dry["bytes"] == run.checkpoint_bytes(10) + run.checkpoint_bytes(20)
    with JsonLines(run.path / "exports.jsonl") as exports:
        exports.append({"step": 20, "folder": "/models/a"})
    assert said(capsys, "prune", "a", "checkpoint.keep_best=0").startswith("10 deleted (")
    assert run.complete_checkpoints() == [20, 30]
    assert said(capsys, "prune", "a").startswith("nothing deleted")
    with run.lock():
        assert "in use by process" in said(capsys, "prune", "a", code=1)


def test_consolidating_changes_the_files_and_nothing_else(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(lab / "runs" / "a")
    (run.folder / "latest").write_text("step-0000030\n")
    folder = run.checkpoint_path(30)
    assert said(capsys, "consolidate", "a") == "a@30: 2 files became one each\n"
    run.verify(30)
    assert {file.name for file in folder.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "verified.json",
    }  # fmt: skip
    expected = RunDirectory.create(lab / "runs" / "b", recipe_toml="", identity="")
    moments = {f"{name}.first": tensor for name, tensor in weights(31).items()}
    state.save(expected, Counters(step=30, tokens=480), weights(30), moments)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (folder / name).read_bytes() == (expected.checkpoint_path(30) / name).read_bytes()
    assert said(capsys, "consolidate", "a@20") == "a@20: is of single files already\n"
    assert run.latest() == 30


def test_an_older_checkpoint_made_one_is_not_the_latest(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(lab / "runs" / "a")
    state.save(run, Counters(step=40), weights(40), {})
    said(capsys, "consolidate", "a@30")
    assert run.latest() == 40


def test_a_sharded_checkpoint_is_a_model_like_any_other(lab: Path) -> None:
    loaded = load_model(RunDirectory(lab / "runs" / "a"), 30)
    assert loaded.step == 30
    assert all(torch.equal(tensor, weights(30)[name]) for name, tensor in loaded.model.state_dict().items())


def test_an_average_is_the_mean_of_the_weights(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, arguments in enumerate((("--last", "3"), ("--steps", "30,10,20"))):
        said(capsys, "average", "a", *arguments, "--name", f"mean{number}")
        run = RunDirectory(lab / "runs" / f"mean{number}")
        read = load_file(run.checkpoint_path(0) / "model.safetensors")
        for name, tensor in read.items():
            mean = torch.stack([weights(step)[name].double() for step in (10, 20, 30)]).mean(0).float()
            assert torch.equal(tensor, mean)
        lineage: dict[str, Any] = run.load("lineage")
        assert (lineage["parent"], lineage["steps"], lineage["step"]) == ("a", [10, 20, 30], 30)
        assert lineage["fresh_optimizer"]
        assert not load_file(run.checkpoint_path(0) / "optimizer.safetensors")
    # And what they came from stays.
    assert said(capsys, "prune", "a").startswith("nothing deleted")


def test_an_average_of_what_is_not_there_is_refused(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        ((), "say which checkpoints, by --last N or by --steps A,B,C"),
        (("--last", "3", "--steps", "10,20"), "say which checkpoints"),
        (("--last", "4"), "--last 4: a has 3 checkpoints"),
        (("--last", "1"), "at least two checkpoints"),
        (("--steps", "10,11"), "a has no checkpoint of step 11; it has: 10, 20, 30"),
        (("--steps", "10,x"), "a has no checkpoint of step x"),
    ):
        assert complaint in said(capsys, "average", "a", *arguments, "--name", "mean", code=2)
    assert not (lab / "runs" / "mean").exists()


def test_an_export_is_remembered(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "a@20", str(lab / "exported")]) == 0
    capsys.readouterr()
    rows = json.loads(said(capsys, "list", "a", "--json"))
    assert rows[1]["kept"] == f"exported to {lab / 'exported'}"
