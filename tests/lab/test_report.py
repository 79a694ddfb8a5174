import json
import math
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import RECIPE, write_json, write_lines, write_run

from calledshot.lab import write_report
from calledshot.recipe import RunError, UsageError


def page(runs: list[Path], folder: Path, **options) -> str:
    output = folder / "report.html"
    write_report(runs, output, **options)
    return output.read_text(encoding="utf-8")


def data(html: str) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1)
    return json.loads(text, parse_constant=pytest.fail)  # browsers know no NaN in JSON


def cell(html: str, label: str) -> str:
    """The first figure beside a label of the efficiency table."""
    return re.search(rf'<th scope="row">{label}.*?<td class="n[^"]*">(.*?)</td>', html, re.S).group(1)


def test_the_same_directories_give_the_same_bytes_anywhere(tmp_path):
    run = write_run(tmp_path / "a" / "demo")
    other = shutil.copytree(run, tmp_path / "b" / "demo")
    assert page([run], tmp_path) == page([other], tmp_path)


def test_saves_in_the_background_are_told_from_what_was_waited_for(tmp_path):
    html = page([write_run(tmp_path / "demo", restart=None)], tmp_path)
    assert "10 checkpoints, 1 min 20 s in all (2.0 s of it waited for), " in html
    write_lines(tmp_path / "demo" / "events.jsonl", [{"time": "2026-01-01T00:00:00Z", "kind": "upload", "seconds": 5}])
    assert "1 upload, 5" in page([tmp_path / "demo"], tmp_path)


def test_nothing_in_the_page_can_be_fetched(tmp_path):
    html = page([write_run(tmp_path / "demo")], tmp_path)
    without_namespace = html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(
        r"https?:|//cdn|@import|url\(|<img|<iframe|<link (?!rel=\"icon\" href=\"data:)", without_namespace
    )
    assert "default-src 'none'" in html


def test_headline_numbers_stand_beside_the_reference_compressors(tmp_path):
    run = write_run(tmp_path / "demo")
    summary = json.loads((run / "summary.json").read_text())
    summary["references"] = {"python": {"xz -9e of the files alone": 1.93, "xz given the training text": 1.37}}
    write_json(run / "summary.json", summary)
    html = page([run], tmp_path)
    bars = re.findall(r'<span class="label">(.*?)</span>.*?<span class="number">(.*?)</span>', html, re.S)
    own = f"{summary['final']['python']['bits_per_byte']:.3f}"
    assert bars == [("xz given the training text", "1.370"), ("demo", own), ("xz -9e of the files alone", "1.930")]
    assert "summary.json: final.python" in html


def test_the_efficiency_table_says_what_the_files_say(tmp_path):
    run = write_run(tmp_path / "demo", steps=400, restart=(240, 260), gpu=True)
    html = page([run], tmp_path, price=3.0)
    assert cell(html, "Parameters") == "6.30M"
    assert cell(html, "… non-embedding") == "4.20M"
    assert cell(html, "Training tokens") == "3.28M"
    assert cell(html, "FLOPs a token") == "2.60 × 10⁷"
    assert cell(html, "Goodput") == "87 %"
    assert cell(html, "Peak memory") == "1.42 GiB"
    assert cell(html, "Energy") == "0.142 kWh"
    assert cell(html, "Steps done twice") == "20"
    assert re.fullmatch(r"4\d–4\d %", cell(html, "MFU"))
    hours = data(html)["runs"][0]["x"]["hours"][-1]
    assert float(cell(html, "Money")) == pytest.approx(hours * 2 * 3.0, rel=0.02)


def test_what_no_file_says_is_not_available(tmp_path):
    run = write_run(tmp_path / "demo", state="running")
    (run / "recipe.toml").write_text("")
    html = page([run], tmp_path, price=3.0)
    for label in ("Parameters", "Goodput", "Energy", "Money"):
        assert cell(html, label) == "n/a"


def test_parameters_of_a_running_run_come_from_its_recipe(tmp_path):
    html = page([write_run(tmp_path / "demo", state="running")], tmp_path)
    assert cell(html, "Parameters") == "6.52M"
    assert "recipe.toml, by arithmetic" in html


def test_impossible_numbers_are_refused(tmp_path):
    run = write_run(tmp_path / "demo")
    rows = [json.loads(line) | {"mfu_low": 5.63, "mfu_high": 6.0} for line in (run / "metrics.jsonl").open()]
    write_lines(run / "metrics.jsonl", rows)
    write_json(run / "summary.json", {"goodput": 1.4})
    html = page([run], tmp_path)
    assert cell(html, "MFU").startswith("n/a (refused")
    assert cell(html, "Goodput").startswith("n/a (refused")
    assert "563" not in cell(html, "MFU")
    assert "mfu_low" not in data(html)["runs"][0]["series"]


def test_text_from_outside_stays_text(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_run(tmp_path / "<b>demo<b>", sample=evil, sources=(evil,))
    write_json(run / "labels.json", {"notes": [{"time": "2026-03-01T09:00:00Z", "text": evil}], "tags": [evil]})
    write_json(run / "lineage.json", {"parent": evil, "step": 3})
    (run / "evals").mkdir()
    write_json(run / "evals" / "x.json", {evil: evil, "references": {evil: {evil: 1.5}}})
    (run / "recipe.toml").write_text(f"name = '{evil}'\n")
    events = [{"kind": evil, "note": evil, "step": 3, "incarnation": 1}]
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(events[0]) + "\n")
    html = page([run, write_run(tmp_path / "other")], tmp_path)
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img" not in html
    assert "<b>" not in html
    assert data(html)["runs"][0]["name"] == "<b>demo<b>"


def test_incidents_are_listed_and_drawn(tmp_path):
    html = page([write_run(tmp_path / "demo", restart=(240, 260))], tmp_path)
    assert "15 min after the one before ended without a word; went on with step 241, 20 steps done twice" in html
    assert {mark["text"].split(":")[0] for mark in data(html)["runs"][0]["marks"]} == {"skipped step", "restart"}
    quiet = page([write_run(tmp_path / "quiet", restart=None)], tmp_path)
    assert "No incident" in quiet


def test_runs_are_compared_with_what_limits_the_comparison(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", layers=8, steps=500, seed=1)]
    html = page(runs, tmp_path)
    assert re.search(r"<code>model.layers</code></th><td><code>6</code></td><td><code>8</code></td>", html)
    assert "did not spend the same FLOPs" in html
    assert "different seeds" in html
    same = page([runs[0], shutil.copytree(runs[0], tmp_path / "again" / "a")], tmp_path)
    assert "The recipes do not differ." in same
    assert "did not spend" not in same
    assert "a (2)" in same


def evaluate(run: Path, bits: list[float]) -> None:
    """An evaluation of the last step whose documents, of 1,000 bytes, cost so many bits a byte."""
    (run / "evals").mkdir()
    step, mean = json.loads((run / "status.json").read_text())["step"], sum(bits) / len(bits)
    measure = {
        "documents": len(bits),
        "bits_per_byte": mean,
        "bits_per_byte_low": mean - 0.02,
        "bits_per_byte_high": mean + 0.02,
    }
    summary = {"kind": "held-out", "step": step, "sources": {"python": measure | {"languages": {"python": measure}}}}
    write_json(run / "evals" / "held-out.json", summary)
    rows = [
        {"source": "python", "document": f"{place}.py", "bytes": 1000, "nats": 1000 * value * math.log(2)}
        for place, value in enumerate(bits)
    ]
    write_lines(run / "evals" / "held-out.jsonl", rows)
    write_json(run / "summary.json", {"final": {"python": {"bits_per_byte": mean, "loss": 2.5}}})


def test_differences_are_paired_by_document_and_noise_is_called_noise(tmp_path):
    runs = [write_run(tmp_path / name, steps=20, restart=None) for name in ("a", "better", "same")]
    documents = [1.0 + 0.1 * place for place in range(12)]
    evaluate(runs[0], documents)
    evaluate(runs[1], [bits - 0.05 - 0.001 * (place % 3) for place, bits in enumerate(documents)])
    evaluate(runs[2], [bits + (0.01 if place % 2 else -0.01) for place, bits in enumerate(documents)])
    html = page([*runs, shutil.copytree(runs[0], tmp_path / "copy")], tmp_path)
    assert "copy and a are the same on every held-out document of python." in html
    better = re.search(r"<li>(better less a on held-out python: .*?)</li>", html).group(1)
    assert "-0.051" in better
    assert "could explain" not in better
    assert "could explain" in re.search(r"<li>(same less a on held-out python: .*?)</li>", html).group(1)
    assert "95 % 1.530 to 1.570 over documents" in html


def test_an_interval_over_few_documents_says_so(tmp_path):
    run = write_run(tmp_path / "demo", steps=20, restart=None)
    evaluate(run, [1.4, 1.6])
    html = page([run], tmp_path)
    assert "95 % 1.480 to 1.520 over few documents (2)" in html
    assert "<td>1.480 to 1.520, few documents</td>" in re.sub(r"<td[^>]*>", "<td>", html)


def test_an_evaluation_of_more_text_replaces_the_runs_own(tmp_path):
    run = write_run(tmp_path / "demo", steps=20, restart=None)
    evaluate(run, [1.4, 1.6])
    html = page([run], tmp_path)
    assert "summary.json: final.python" in html
    for size, origin in ((100, "evals/held-out.json"), (100_000, "summary.json: final.python")):
        final = {"bits_per_byte": 1.2, "loss": 2.0, "bytes_evaluated": size}
        write_json(run / "summary.json", {"final": {"python": final}})
        found = json.loads((run / "evals" / "held-out.json").read_text())
        found["sources"]["python"]["bytes"] = 2000
        write_json(run / "evals" / "held-out.json", found)
        assert re.search(rf'<span class="detail">[^<]*{origin}</span>', page([run], tmp_path))


def test_a_recipe_of_a_newer_version_is_compared_as_it_is_written(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    with (runs[1] / "recipe.toml").open("a") as file:
        file.write("\n[telepathy]\nstrength = 3\n")
    html = page(runs, tmp_path)
    assert "does not understand all of the recipe" in html
    assert "<code>telepathy.strength</code>" in html


def test_samples_are_a_handful_from_first_to_last_and_long_ones_are_cut(tmp_path):
    run = write_run(tmp_path / "demo", steps=50, restart=None)
    rows = [{"step": step, "incarnation": 1, "prompt": "x", "text": "y" * 9000} for step in range(1, 1001)]
    write_lines(run / "samples.jsonl", rows)
    html = page([run], tmp_path)
    steps = [int(text.replace(",", "")) for text in re.findall(r'class="when">step ([\d,]+)', html)]
    assert steps[0] == 1
    assert steps[-1] == 1000
    assert len(steps) <= 7
    assert len(html) < 500_000


DAMAGE = {
    "only a recipe": lambda run: [path.unlink() for path in run.glob("*.json*")],
    "no recipe": lambda run: (run / "recipe.toml").unlink(),
    "torn recipe": lambda run: (run / "recipe.toml").write_bytes(b"[mod\xff"),
    "torn metrics": lambda run: (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-40]),
    "binary metrics": lambda run: (run / "metrics.jsonl").write_bytes(bytes(range(256)) * 20),
    "metrics without numbers": lambda run: write_lines(run / "metrics.jsonl", [{"step": "1", "loss": {}, "time": 3}]),
    "torn status": lambda run: (run / "status.json").write_text('{"state": "run'),
    "foreign status": lambda run: (run / "status.json").write_text("[1]"),
    "torn summary": lambda run: (run / "summary.json").write_text("{"),
    "foreign summary": lambda run: write_json(run / "summary.json", {"final": [1], "parameters": 3, "goodput": ""}),
    "foreign labels": lambda run: write_json(run / "labels.json", {"tags": 3, "notes": "x", "archived": []}),
    "summary is a list": lambda run: write_json(run / "summary.json", [1]),
    "labels are a list": lambda run: write_json(run / "labels.json", [1]),
    "torn lineage": lambda run: (run / "lineage.json").write_text("{"),
    "torn environment": lambda run: (run / "incarnations/0001/environment.json").write_text("{"),
    "no incarnations": lambda run: shutil.rmtree(run / "incarnations"),
    "a folder for a file": lambda run: ((run / "samples.jsonl").unlink(), (run / "samples.jsonl").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("state", ["done", "running"])
def test_a_damaged_directory_is_shown_with_a_warning(tmp_path, damage, state):
    run = write_run(tmp_path / "demo", steps=60, restart=(30, 40), state=state)
    DAMAGE[damage](run)
    html = page([run, write_run(tmp_path / "whole", steps=20, restart=None)], tmp_path)
    assert "Efficiency" in html
    quiet = ("torn metrics", "torn environment", "no incarnations", "foreign labels", "foreign summary")
    if state == "done" and damage not in quiet:
        assert 'class="warning">demo: ' in html


def test_padding_is_shown(tmp_path):
    run = write_run(tmp_path / "demo")
    write_json(run / "summary.json", {**json.loads((run / "summary.json").read_text()), "packing_loss": 0.391})
    assert "39.1 %" in cell(page([run], tmp_path), "Packing loss")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.just("2026-03-01T09:00:00Z"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def rows(*fields: str):
    return st.lists(
        st.dictionaries(st.sampled_from(["step", "incarnation", "time", "tokens", "flops", *fields]), JSON), max_size=6
    )


@given(
    metrics=rows("loss", "lr", "mfu_low", "mfu_high", "tokens_per_second", "step_seconds"),
    validation=rows("source", "loss", "bits_per_byte", "bytes_evaluated"),
    samples=rows("prompt", "text"),
    events=rows("kind", "state", "seconds", "bytes"),
    documents=st.dictionaries(st.sampled_from(["status", "summary", "lineage", "probes", "data", "labels"]), JSON),
    summary=st.dictionaries(st.sampled_from(["parameters", "final", "references", "goodput", "energy_joules"]), JSON),
    environment=st.dictionaries(st.sampled_from(["gpus", "world_size", "x"]), JSON),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_any_json_at_all_gives_a_page(tmp_path, metrics, validation, samples, events, documents, summary, environment):
    run = tmp_path / "demo"
    shutil.rmtree(run, ignore_errors=True)
    (run / "incarnations" / "0001").mkdir(parents=True)
    (run / "evals").mkdir()
    (run / "recipe.toml").write_text(RECIPE.format(name="x", seed=0, layers=2, learning_rate=0.1, tokens=8192))
    for name, content in (("metrics", metrics), ("validation", validation), ("samples", samples), ("events", events)):
        write_lines(run / f"{name}.jsonl", content)
    for name, content in {"summary": summary, **documents}.items():
        write_json(run / f"{name}.json", content)
    write_json(run / "evals" / "one.json", documents.get("summary"))
    write_json(run / "incarnations" / "0001" / "environment.json", environment)
    assert data(page([run], tmp_path, price=1.0))["runs"]


def test_what_is_no_run_and_what_is_no_place_for_a_report_is_said(tmp_path):
    run = write_run(tmp_path / "demo", steps=20, restart=None)
    with pytest.raises(UsageError, match="is not a run"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UsageError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        write_report([run], tmp_path / "absent" / "report.html")
