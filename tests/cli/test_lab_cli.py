import json
import sys
import time
from pathlib import Path

import pytest

from calledshot.cli import main
from calledshot.rundir import read_jsonl

sys.path.append(str(Path(__file__).parents[1] / "lab"))
from synthetic import write_lines, write_run


@pytest.fixture
def lab(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "demo", steps=50, restart=None)
    write_run(tmp_path / "runs" / "wide", steps=60, restart=(30, 40), layers=8, state="running")
    (tmp_path / "runs" / "not a run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_shows_true_states(lab, capsys):
    assert main(["runs", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(found) == {"demo", "wide"}
    # Nothing holds its lock and its heartbeat is old: it says running, but nobody is.
    assert found["wide"]["state"] == "interrupted"
    assert found["demo"]["state"] == "done"
    assert found["wide"]["step"] == found["wide"]["total_steps"] == 60
    summary = json.loads((lab / "runs/demo/summary.json").read_text())
    assert found["demo"]["held_out"]["python"] == summary["final"]["python"]["bits_per_byte"]
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "name",
        "state",
        "step",
        "tokens",
        "loss",
        "held-out",
        "bits/byte",
        "tok/s",
        "age",
        "tags",
    ]
    assert lines[2].split()[:4] == ["demo", "done", "50/50", "410k"]


def with_an_encoder(run: Path, context: int = 256, marked: bool = True) -> None:
    """Makes a run's held-out numbers those of an encoder-decoder."""
    recipe = (run / "recipe.toml").read_text()
    recipe = recipe.replace("context = 256", f'context = {context}\ntopology = "encoder-decoder"')
    (run / "recipe.toml").write_text(
        recipe.replace("tokens = 8192", "tokens = 16384") + '\n[objective]\nkind = "span"\n'
    )
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["final"].values() if marked else ():
        row["predicted"] = "suffixes"
    (run / "summary.json").write_text(json.dumps(summary))


def test_suffixes_are_told_from_whole_documents(lab, capsys):
    write_run(lab / "runs" / "both", steps=50, restart=None)
    write_run(lab / "runs" / "older", steps=50, restart=None)
    with_an_encoder(lab / "runs" / "both")
    with_an_encoder(lab / "runs" / "older", context=512, marked=False)
    assert main(["runs", "--json"]) == 0
    found = {one["name"]: one["predicted"]["python"] for one in json.loads(capsys.readouterr().out)}
    assert found == {"demo": "whole", "wide": "whole", "both": "suffixes", "older": "suffixes"}
    assert main(["runs"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "(suffixes)" in lines["both"] and "(suffixes)" in lines["older"] and "(suffixes)" not in lines["demo"]

    assert main(["diff", "demo", "both"]) == 0
    captured = capsys.readouterr()
    row = next(line for line in captured.out.splitlines() if line.startswith("Held-out bits per byte, python"))
    assert row.endswith("(suffixes)") and row.count("(suffixes)") == 1
    assert "these numbers do not compare; `shot eval --predict suffixes`" in captured.err
    assert main(["diff", "both", "older"]) == 0
    assert "(contexts of 256 and 512), so these suffixes are not the same text" in capsys.readouterr().err
    assert main(["diff", "demo", "demo"]) == 0
    assert "suffixes" not in "".join(capsys.readouterr())
    assert main(["report", "both"]) == 0
    assert "bits per byte on suffixes of held-out python" in (lab / "report.html").read_text()


def test_runs_of_an_empty_lab(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["runs"]) == 0
    assert "no runs" in capsys.readouterr().err


def test_runs_reads_the_end_of_the_logs_only(lab, capsys):
    log = lab / "runs/wide/metrics.jsonl"
    rows = log.read_bytes()
    with log.open("wb") as file:
        file.seek(1 << 36)  # a hole: 64 GiB that take no room, and a minute to read
        file.write(b"\n" + rows)
    started = time.monotonic()
    assert main(["runs", "--json"]) == 0
    assert time.monotonic() - started < 10
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    last = json.loads(rows.splitlines()[-1])
    assert (found["wide"]["step"], found["wide"]["tokens"], found["wide"]["loss"]) == (60, last["tokens"], last["loss"])


def test_runs_knows_which_measurements_a_restart_took_back(lab, capsys):
    """The run measures every 6 steps, died after step 40 and went on from 30."""
    folder = lab / "runs/wide"
    logs = {log: read_jsonl(folder / f"{log}.jsonl") for log in ("metrics", "validation")}
    measured = {row["step"]: row["bits_per_byte"] for row in logs["validation"]}

    def shown(last: int) -> float:
        """Of the run as it was when its second incarnation had come to step `last`."""
        for log, rows in logs.items():
            write_lines(folder / f"{log}.jsonl", [r for r in rows if r["incarnation"] == 1 or r["step"] <= last])
        main(["runs", "--json"])
        return {one["name"]: one for one in json.loads(capsys.readouterr().out)}["wide"]["held_out"]["python"]

    assert shown(30) == measured[36]
    assert shown(31) == shown(35) == measured[30]
    assert shown(36) == measured[36]
    assert shown(60) == measured[60]


def test_runs_goes_on_over_damage(lab, capsys):
    (lab / "runs/demo/status.json").write_text("{")
    (lab / "runs/wide/summary.json").write_text("[")
    (lab / "runs/wide/metrics.jsonl").write_bytes(b'\xff\xfe{"step')
    (lab / "runs/wide/validation.jsonl").unlink()
    (lab / "runs/wide/validation.jsonl").mkdir()
    assert main(["runs"]) == 0
    shown = capsys.readouterr()
    assert "unknown" in shown.out
    assert "demo: status.json cannot be read" in shown.err


def test_notes_tags_and_the_archive(lab, capsys):
    assert main(["note", "demo", "first light", "--tag", "good", "--tag", "old"]) == 0
    assert main(["note", "demo", "--untag", "old", "--archive"]) == 0
    labels = json.loads((lab / "runs/demo/labels.json").read_text())
    assert [note["text"] for note in labels["notes"]] == ["first light"]
    assert (labels["tags"], labels["archived"]) == (["good"], True)
    main(["runs"])
    assert "demo" not in capsys.readouterr().out
    main(["runs", "--all"])
    assert "good, (archived)" in capsys.readouterr().out
    assert main(["note", "demo", "--no-archive"]) == 0
    main(["runs"])
    assert "demo" in capsys.readouterr().out
    assert main(["note", "demo"]) == 2
    assert main(["note", "demo", "--tag", ""]) == 2
    assert main(["note", "dem", "x"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err


def test_diff(lab, capsys):
    assert main(["diff", "demo", "wide", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"key": "model.layers", "values": [6, 8]} in found["recipe"]
    assert "name" not in {row["key"] for row in found["recipe"]}
    environment = lab / "runs/wide/incarnations/0002/environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"commit": "deadbeef"}))
    assert main(["diff", "demo", "wide"]) == 0
    shown = capsys.readouterr()
    assert [line.split() for line in shown.out.splitlines() if line.startswith("commit")] == [
        ["commit", "6d5daa8", "deadbeef"]
    ]
    assert "did not spend the same FLOPs" in shown.err
    assert main(["diff", "demo", "nothing"]) == 2


def test_report(lab, capsys):
    assert main(["report", "demo", "runs/wide", "-o", "out.html", "--price", "2.5"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "out.html\n"
    assert "wide: The run is interrupted" in shown.err
    assert "<title>demo and wide · report</title>" in (lab / "out.html").read_text()
    for wrong in (
        ["report"],
        ["report", "nothing"],
        ["report", "demo", "--price", "nan"],
        ["report", "demo", "-o", "runs"],
    ):
        assert main(wrong) == 2, wrong
    assert main(["report", "demo", "-o", "absent/out.html"]) == 1


def test_numbers_over_other_amounts_of_text_are_told_apart(lab, capsys):
    for name, size in (("demo", 190_000), ("wide", 40_000)):
        for file in ("summary.json", "validation.jsonl"):
            path = lab / "runs" / name / file
            if file == "summary.json" and path.exists():
                summary = json.loads(path.read_text())
                summary["final"]["python"]["bytes_evaluated"] = size
                path.write_text(json.dumps(summary))
            elif file == "validation.jsonl":
                write_lines(path, [row | {"bytes_evaluated": size} for row in read_jsonl(path)])
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out
    assert "(186 KiB)" in lines and "(39.1 KiB)" in lines
    assert main(["diff", "demo", "wide"]) == 0
    said = capsys.readouterr()
    assert "not measured on the same text (39.1 KiB to 186 KiB of it)" in said.out + said.err
