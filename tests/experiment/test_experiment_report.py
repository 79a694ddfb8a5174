"""The report of planted run directories: what every arm cost, and what is said about its wins without being asked."""

import json

import numpy as np
import pytest
from planted import Truth, plant, suite

from calledshot.experiment import make_report, plan_json, plan_markdown, report_markdown
from calledshot.experiment.accounts import changed_lines, differing
from calledshot.experiment.matching import resolve
from calledshot.experiment.outcomes import spikes
from calledshot.experiment.plan import state

ARMS = (
    'name = "base"',
    'name = "good"\nnote = "Better."\nset.model.kv_heads = 1',
    'name = "slow"\nset.model.layers = 3',
    'name = "tied"\nset.model.tied_embeddings = true',
    'name = "vocabulary"\nset.model.vocabulary = 1536',
    'name = "shaky"\nset.model.rope_base = 500',
    'name = "broken"\nset.model.rope_base = 100',
)
TRUTHS = {
    "base": Truth(1.5),
    "good": Truth(1.4),
    "slow": Truth(1.46, rate=5_000),
    "tied": Truth(1.5, rate=8_000),
    "vocabulary": Truth(1.45, rate=12_000),
    "shaky": Truth(1.5, spike=25),
    "broken": Truth(9.0, state="failed", skipped=5),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    noise = np.random.default_rng(0)

    def truth(arm, size, seed):
        if size == "M" and arm != "base":
            return None
        known = TRUTHS[arm]
        return Truth(known.loss + 0.005 * noise.normal(), known.rate, known.state, known.skipped, known.spike)

    plan = plant(suite(*ARMS, sizes=(("S", 64), ("M", 128))), lab, truth)
    return plan, make_report(plan, lab), lab


def remarks(report, kind):
    return {one.arm: one.text for one in report.remarks if one.kind == kind and one.size == "S"}


def test_verdicts_come_from_the_directories(made):
    _, report, _ = made
    verdicts = {row.arm: row.effect.verdict for row in report.rows if row.size == "S" and row.effect}
    assert verdicts["good"] == verdicts["slow"] == verdicts["vocabulary"] == "better"
    assert verdicts["tied"] == verdicts["shaky"] == "inside the noise"
    assert report.row("broken", "S").effect.reason == "no result of broken"
    assert report.row("good", "M").effect.reason == "no result of good"
    assert report.notes[0].startswith("21 of 42 runs are done")


def test_every_cost_stands_beside_every_arm(made):
    plan, report, _ = made
    row, base = report.row("good", "S"), report.row("base", "S")
    costs = plan.cells["good", "S"].cost
    assert row.account.parameters == costs.parameters.total
    assert sum(row.account.kinds.values()) == costs.parameters.total - costs.parameters.vectors
    assert row.flops == pytest.approx(costs.flops)
    assert row.account.kv_bytes_per_token == base.account.kv_bytes_per_token / 2
    assert (row.tokens_per_second, row.memory) == (10_000, 400_000_000)
    assert row.seconds == pytest.approx(costs.tokens / 10_000)
    assert row.changed_lines == 1 and row.adjusted.startswith("model.hidden ")


def test_a_win_that_the_clock_takes_back_is_named(made):
    _, report, _ = made
    text = remarks(report, "clock")["slow"]
    assert text.startswith("wins as matched by parameters but loses by seconds: it takes 2.00 times the baseline's")
    assert "good" not in remarks(report, "clock")


def test_parameters_moved_to_where_they_are_cheap_are_named(made):
    _, report, _ = made
    moved = remarks(report, "moved")
    assert set(moved) == {"tied", "vocabulary"}
    assert moved["vocabulary"].startswith("moves parameters to where they are cheap: embedding +")
    assert moved["tied"].startswith("moves parameters to where they cost FLOPs: embedding -")


def test_a_win_bought_with_flops_is_named(made):
    _, report, _ = made
    assert remarks(report, "bought")["slow"].startswith("its win comes with FLOPs a token +")
    assert "good" not in remarks(report, "bought")


def test_instability_and_failure_are_named(made):
    _, report, _ = made
    assert remarks(report, "unstable") == {
        "shaky": "unstable: 3 loss spikes",
        "broken": "unstable: 15 skipped updates, 3 diverged",
    }
    assert remarks(report, "failed") == {"broken": "3 of its 3 runs failed"}
    assert report.row("shaky", "S").effect.verdict == "inside the noise"


def test_a_falling_noisy_loss_has_no_spikes_and_a_jump_is_one():
    noise = np.random.default_rng(0)
    losses = [8 * step**-0.3 + 0.05 * noise.normal() for step in range(1, 400)]
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert spikes(rows) == ()
    for step in (200, 201, 202):
        rows[step]["loss"] += 2.0
    assert spikes(rows) == (201,)


def test_markdown_and_json_say_the_same(made):
    _, report, _ = made
    text = report_markdown(report)
    for row in report.rows:
        assert f"| {row.arm} |" in text
    loss = report.row("good", "S").loss
    assert f"| good | {loss:.4f} | 3 |" in text
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert next(row for row in data["rows"] if (row["arm"], row["size"]) == ("good", "S"))["loss"] == loss
    assert data["verdicts"]["better"] == 3
    assert data["noise"]["S"]["degrees"] == 12  # all but broken have three runs
    assert text.count("loses by seconds") == 1


def test_a_plan_says_what_is_left_and_how_long_it_takes(made):
    plan, _, lab = made
    states = {run.name: state(run, lab) for run in plan.runs}
    text = plan_markdown(plan, plan.runs, states, 2)
    assert "42 runs, 21 of them done" in text and "2 at a time, at the speeds measured here" in text
    data = plan_json(plan, plan.runs, states, 2, 0.0)
    # What is left of "broken" at S has the FLOP/s of its neighbours; at M the baseline's.
    speed = np.median(
        [rate * plan.cells[key].cost.flops_per_token.total for key, rate in plan.rates.items() if key[1] == "S"]
    )
    known = next(run for run in data["runs"] if run["name"] == "planted-broken-S-s0")
    assert known["seconds"] == pytest.approx(
        known["tokens"] * plan.cells["broken", "S"].cost.flops_per_token.total / speed
    )
    assert data["seconds_left"] == pytest.approx(
        sum(run["seconds"] for run in data["runs"] if run["state"] != "done") / 2
    )


def test_a_file_of_ones_own_counts_its_lines(tmp_path):
    (tmp_path / "mine.py").write_text("a\nb\nc\n")
    (tmp_path / "yours.py").write_text("a\nB\nc\nd\n")
    assert differing(["a", "b", "c"], ["a", "B", "c", "d"]) == 3
    arms = ('name = "base"', 'name = "mine"\nset.optimizer.name = "mine.py:Best"')
    cells = resolve(suite(*arms))
    assert changed_lines(cells["mine", "S"], cells["base", "S"], tmp_path) == 1 + 3
    both = (
        'name = "base"\nset.optimizer.name = "mine.py:Best"',
        'name = "yours"\nset.optimizer.name = "yours.py:Best"',
    )
    cells = resolve(suite(*both))
    assert changed_lines(cells["yours", "S"], cells["base", "S"], tmp_path) == 1 + 3


def test_padding_is_said_where_there_is_much_more_of_it(tmp_path):
    shares = {"base": 0.03, "good": 0.075, "slow": 0.4}
    plan = plant(suite(*ARMS[:3]), tmp_path, lambda arm, size, seed: Truth(1.5, padding=shares[arm]))
    report = make_report(plan, tmp_path)
    assert report.row("slow", "S").more_padding == pytest.approx(0.37)
    assert report.row("slow", "S").differs.endswith("KV bytes +50 %, padding +37 points")
    assert "padding" not in report.row("good", "S").differs
    assert "padding +37 points |" in report_markdown(report)


def test_tokens_and_memory_of_an_encoder_decoder_are_explained(tmp_path):
    arms = ('name = "base"', 'name = "both"\nset.model = { topology = "encoder-decoder", layers = 1 }\nmatch = "none"')
    asked = suite(*arms, more='set.objective.kind = "prefix"\n')
    plan = plant(asked, tmp_path, lambda arm, size, seed: Truth(1.5))
    for text in (report_markdown(make_report(plan, tmp_path)), plan_markdown(plan, [], {}, 1)):
        assert text.count("an encoder-decoder's are those of both its stacks") == 1
    assert "both its stacks" not in plan_markdown(plant(suite(*ARMS[:2]), tmp_path / "x", lambda *_: None), [], {}, 1)


def test_runs_that_computed_differently_are_said_to_have(tmp_path):
    plan = plant(suite(*ARMS[:2]), tmp_path, lambda arm, size, seed: Truth(1.5))
    for arm, dtype in (("base", "float32"), ("good", "bfloat16")):
        machine = {"device": "cpu", "dtype": dtype, "compile": False, "threads": 1, "micro_tokens": 512}
        (tmp_path / "runs" / f"planted-{arm}-S-s0" / "probes.json").write_text(json.dumps({"machines": {"x": machine}}))
    notes = " ".join(make_report(plan, tmp_path).notes)
    assert "did not compute alike (cpu bfloat16, 1 threads; cpu float32, 1 threads)" in notes
