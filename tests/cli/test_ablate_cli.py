"""`shot ablate` as it is typed."""

import json
import sys
from pathlib import Path

import pytest

from calledshot.cli import main

sys.path.append(str(Path(__file__).parents[1] / "experiment"))
from planted import Truth, plant

from calledshot.experiment import load_suite

SUITE = """
about = "A small one."
set.model = { layers = 2, heads = 4, kv_heads = 2, vocabulary = 1024, context = 64 }
set.batch.tokens = 512
[[sizes]]
name = "S"
tokens = "100k"
set.model.width = 64
[[arms]]
name = "base"
[[arms]]
name = "mqa"
set.model.kv_heads = 1
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SUITE)
    return tmp_path


def test_a_plan_trains_nothing(lab, capsys):
    assert main(["ablate", "small.toml", "--plan", "--speed", "20k"]) == 0
    text = capsys.readouterr().out
    assert "| mqa | 3 | parameters |" in text and "model.hidden 192 → 200" in text and "KV bytes -50 %" in text
    assert "6 runs, 0 of them done" in text and "at the speed given" in text
    assert main(["ablate", "small.toml", "--plan", "--json", "--only", "mqa", "model.width=128"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {run["arm"] for run in plan["runs"]} == {"mqa"}
    assert plan["seconds_left"] is None
    assert plan["cells"][1]["moved"]["after"] == 408
    assert not (lab / "runs").exists()


def test_a_report_of_what_there_is(lab, capsys):
    plant(load_suite("small.toml"), lab, lambda arm, size, seed: Truth(1.5 - 0.1 * (arm == "mqa") + 0.001 * seed))
    assert main(["ablate", "small.toml", "--report"]) == 0
    captured = capsys.readouterr()
    assert "| mqa | 1.4010 | 3 | -0.1000" in captured.out
    assert Path(captured.err.strip()) == lab / "ablations" / "small" / "report.html"
    assert main(["ablate", "small.toml", "--report", "--json", "-o", "here.html"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"]["better"] == 1
    assert (lab / "here.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["noan", "--plan"], "no suite 'noan' and no file of that name; did you mean noam?"),
        (["small.toml", "--only", "mqq"], "suite small has no arm 'mqq'; did you mean mqa?"),
        (["small.toml", "--size", "L"], "suite small has no size 'L'; there are S"),
        (["small.toml", "--plan", "model.kv_head=1"], "unknown key model.kv_head; did you mean model.kv_heads?"),
        (["small.toml", "--parallel", "-1"], "--parallel -1"),
        (["small.toml", "--plan", "duration.minutes=3"], "arms are compared by tokens or FLOPs"),
    ],
)
def test_mistakes_are_told_in_one_line(lab, capsys, line, said):
    assert main(["ablate", *line]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not (lab / "runs").exists()
