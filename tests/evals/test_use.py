"""`shot eval` and `shot export` as they are typed."""

import json
import shutil

import pytest
import torch

from calledshot.cli import main
from calledshot.model import Decoder
from calledshot.model.huggingface import load_huggingface
from calledshot.rundir import RunDirectory
from calledshot.training import load_model


@pytest.fixture(autouse=True)
def in_lab(lab, monkeypatch):
    monkeypatch.chdir(lab)
    (lab / "lab.toml").touch()


def test_an_evaluation_is_printed_and_kept(random_run, capsys):
    assert main(["eval", "random", "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    identifier = printed["id"]
    assert identifier == "held-out-step-0000007"
    kept = random_run.evals()[identifier]
    assert kept["sources"] == printed["sources"]
    rows = random_run.eval_rows(identifier)
    for source, table in printed["sources"].items():
        mine = [row for row in rows if row["source"] == source]
        assert len(mine) == table["documents"]
        assert sum(row["nats"] for row in mine) / sum(row["tokens"] for row in mine) == pytest.approx(table["loss"])
    assert main(["eval", "random@7"]) == 0
    assert len(random_run.eval_rows(identifier)) == len(rows)


def test_runs_stand_side_by_side(random_run, uniform_run, capsys):
    assert main(["eval", "uniform", "random", "--source", "prose", "--tokens", "1k", "--compressors"]) == 2
    assert main(["eval", "uniform", "random", "--source", "prose", "--compressors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["run", "source"]
    first_words = [line.split("  ")[0] for line in lines[1:]]
    assert first_words == ["uniform@7"] * 3 + ["random@7"] * 3 + ["xz -9e", "xz -9e given the training text"]
    assert "p = " in lines[4]
    kept = uniform_run.evals()["held-out-prose-step-0000007"]
    assert set(kept["references"]["prose"]) == {"xz -9e", "xz -9e given the training text"}


def test_what_is_known_of_compressors_stays(make_run, random_weights, capsys):
    run = make_run("squeezed", random_weights)
    assert main(["eval", "squeezed", "--source", "prose", "--compressors"]) == 0
    first = run.evals()["held-out-prose-step-0000007"]
    assert main(["eval", "squeezed", "--source", "prose", "--dtype", "bfloat16"]) == 0
    second = run.evals()["held-out-prose-step-0000007"]
    assert second["references"] == first["references"] and second["dtype"] == "bfloat16"
    assert second["sources"] != first["sources"]


def test_one_run_that_cannot_be_evaluated_stops_no_other(random_run, uniform_run, lab, tmp_path, capsys):
    lost = tmp_path / "elsewhere" / "lost"
    shutil.copytree(random_run.path, lost)
    (lost / "data.json").write_text(json.dumps({**random_run.load("data"), "folder": "gone"}))
    assert main(["eval", str(lost), "uniform", "random", "--json"]) == 1
    captured = capsys.readouterr()
    assert [one["run"] for one in json.loads(captured.out)] == ["uniform", "random"]
    (complaint,) = [line for line in captured.err.splitlines() if line.startswith("shot: ")]
    assert str(lost) in complaint
    assert main(["eval", str(lost), str(lost)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 2


def test_unlike_numbers_are_not_subtracted(make_run, random_weights, random_run, capsys):
    """Suffixes of pieces of other lengths, and of an encoder-decoder, which has no others."""
    make_run("wider", random_weights, context=96)
    make_run("both", random_weights, "encoder-decoder", "span")
    assert main(["eval", "random", "wider", "--predict", "suffixes", "--source", "prose"]) == 0
    captured = capsys.readouterr()
    assert "The runs read pieces of 44 and 92 tokens" in captured.err and "other text" in captured.out
    assert main(["eval", "random", "both", "--json"]) == 0
    captured = capsys.readouterr()
    assert "were not asked for the same (held-out, held-out-suffixes)" in captured.err
    assert "less_first" not in json.loads(captured.out)[1]
    assert main(["eval", "random", "both", "--predict", "suffixes"]) == 0
    captured = capsys.readouterr()
    assert "compare" not in captured.err and "p = " in captured.out


def test_a_copy_without_its_lab_says_what_it_lacks(random_run, lab, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "backup" / "random"
    shutil.copytree(random_run.path, copy)
    folder = random_run.load("data")["folder"]
    text = lab / "notes" / "0.txt"
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["eval", str(copy)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    for part in (str(copy), folder, str(tmp_path / "data"), f"shot data build {copy}/recipe.toml", "--text FILE"):
        assert part in complaint
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["eval", str(copy), "--text", str(text)]) == 0
    # Brought beside it, or there already in the lab that one stands in.
    (tmp_path / "data").mkdir()
    shutil.copytree(lab / "data" / folder, tmp_path / "data" / folder)
    assert main(["eval", str(copy)]) == 0
    shutil.rmtree(tmp_path / "data")
    monkeypatch.chdir(lab)
    assert main(["eval", str(copy)]) == 0
    assert not (tmp_path / "data").exists()


def test_any_text_can_be_scored(random_run, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("the model of the text")
    (tmp_path / "b.txt").write_text("ünï")
    assert main(["eval", "random", "--json", "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["sources"]["text"]["documents"] == 2
    assert printed["sources"]["text"]["bytes"] == 26
    assert main(["eval", "random", "--text", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("] few documents")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "eval needs a run"),
        (["randm"], "did you mean 'random'"),
        (["random@3"], "no complete checkpoint of step 3"),
        (["random", "--source", "poems"], "there are prose, notes"),
        (["random", "--tokens", "-4"], "--tokens -4"),
        (["random", "--text", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_bad_usage_is_one_line(arguments, words, random_run, capsys):
    before = random_run.evals()
    assert main(["eval", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data: ")]
    assert words in line
    assert random_run.evals() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_exported(dtype, random_run, capsys, tmp_path):
    folder = tmp_path / "out"
    assert main(["export", "random", str(folder), "--dtype", dtype]) == 0
    assert "Qwen3ForCausalLM, step 7" in capsys.readouterr().out
    expected = load_model(random_run).model
    config, weights = load_huggingface(folder)
    decoder = Decoder(config)
    decoder.load_state_dict(weights)
    for ours, theirs in zip(expected.parameters(), decoder.parameters(), strict=True):
        assert torch.equal(ours.to(getattr(torch, dtype)).float(), theirs)
    assert "step 7" in (folder / "README.md").read_text()
    assert main(["export", "random", str(folder)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", "random", str(folder), "--force"]) == 0
    assert main(["export", "random@7", str(folder), "--step", "3", "--force"]) == 2


def test_a_recipe_without_a_class_is_refused_before_anything_is_read(lab, capsys, tmp_path):
    recipe = "[model]\nsoftcap = 30.0\n[duration]\ntokens = 100_000\n"
    run = RunDirectory.create(lab / "runs" / "capped", recipe_toml=recipe, identity="x")
    assert main(["export", run.name, str(tmp_path / "out")]) == 2
    assert "model.softcap" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
