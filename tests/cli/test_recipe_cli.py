"""`shot recipe`: what is printed, where, and with which exit code."""

import json
import tomllib

import pytest

from calledshot.cli import main
from calledshot.recipe import cost, from_dict, identity, load_recipe


def printed(capsys: pytest.CaptureFixture[str], *line: str, code: int = 0) -> str:
    assert main(["recipe", *line]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    assert main(["recipe", *line]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shot: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_typo_in_a_key_exits_2_and_names_the_key(capsys):
    assert "model.layers" in refused(capsys, "show", "demo", "model.layrs=3")
    assert "model.layers" in refused(capsys, "show", "demo", "--model.layrs", "3")
    assert "key or option" in refused(capsys, "show", "demo", "--jsno")


def test_what_show_prints_is_the_recipe_itself(capsys):
    out = printed(capsys, "show", "demo", "model.layers=4", "--model.width", "128", "--seed=3")
    assert from_dict(tomllib.loads(out)) == load_recipe("demo", ["model.layers=4", "model.width=128", "seed=3"])


def test_show_states_the_cost_and_what_it_assumed(capsys):
    out = printed(capsys, "show", "1B", "--mfu", "50%", "--peak", "1P", "--gpus", "8", "--price", "2.5")
    found = cost(load_recipe("1B"))
    hours = found.flops / (0.5 * 1e15 * 8 * 3600)
    assert f"{found.parameters.total:,}" in out and f"{found.flops_per_token.total:,}" in out
    assert f"{hours:,.1f} hours" in out
    assert "computed, not measured: 50% of 1000TFLOP/s on 8 GPUs" in out
    assert f"{hours * 8 * 2.5:,.2f}  at 2.5 a GPU hour" in out


def test_show_does_not_invent_the_tokens_of_minutes(capsys):
    assert printed(capsys, "show", "demo").count("unknown until measured") == 3
    assert "4,198,400" in printed(capsys, "show", "demo", "--speed", "7k")


def test_show_as_json(capsys):
    data = json.loads(printed(capsys, "show", "demo", "--json", "model.layers=4"))
    recipe = load_recipe("demo", ["model.layers=4"])
    assert from_dict(data["recipe"]) == recipe
    assert data["identity"] == identity(recipe)
    assert data["cost"]["parameters"]["total"] == cost(recipe).parameters.total
    assert data["cost"]["tokens"] is None and data["cost"]["hours"] == pytest.approx(1 / 6)
    assert set(data["learning_rates"]) == {"matrix", "embedding", "head", "vector"}
    assert data["assumed"]["mfu"] == 0.4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mfu", "140%"], "more than the peak"),
        (["--mfu", "0"], "more than 0"),
        (["--gpus", "0"], "more than 0"),
        (["--peak", "fast"], "--peak"),
        (["--peak", "989GiB"], "--peak"),
        (["--price", "free"], "--price"),
    ],
)
def test_options_out_of_range(options, said, capsys):
    assert said in refused(capsys, "show", "1B", *options)


def test_check_lists_every_problem_and_exits_2(capsys):
    assert "nothing wrong" in printed(capsys, "check", "demo")
    out = printed(capsys, "check", "demo", "model.heads=5", "batch.tokens=1000", code=2)
    assert len(out.splitlines()) == 3 and "batch.tokens = 1000" in out
    found = json.loads(printed(capsys, "check", "demo", "data.held_out=0", "--json", code=2))
    assert len(found["problems"]) == 1


def test_memory_says_what_to_type_next(capsys):
    out = printed(capsys, "memory", "7B", "seed=3", "--ranks", "8")
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()][1:]
    assert [row[:2] for row in rows] == [
        ["1", "none"],
        ["2", "none"],
        ["4", "none"],
        ["8", "none"],
        ["2", "selective"],
        ["2", "full"],
    ]
    assert [row for row in rows if row[-2:] == ["take", "this"]] == [rows[1]] and rows[0][-2:] == ["too", "much"]
    command = out.splitlines()[-1].removeprefix("Fits: ").split()
    assert command[:4] == ["shot", "train", "7B", "seed=3"] and command[-2:] == ["--ranks", "8"]
    assert "parallel.shard=2" in command
    assert "nothing wrong" in printed(capsys, "check", *command[2:-2])


def test_memory_says_what_lacks_where_nothing_fits(capsys):
    out = printed(capsys, "memory", "20B", "--ranks", "4")
    assert "Does not fit: " in out and "too much with 4,096 tokens at a time. Take 8 ranks" in out
    assert "host memory" not in printed(capsys, "memory", "demo", "checkpoint.asynchronous=false", "--device", "cpu")
    assert "GiB" in refused(capsys, "memory", "7B", "--memory", "80")
    assert "too few for 4096 ranks" in refused(capsys, "memory", "demo", "--ranks", "4096")


def test_memory_as_json(capsys):
    data = json.loads(printed(capsys, "memory", "7B", "--memory", "192GB", "--json"))
    assert data["fits"] and data["needed"] <= data["usable"] < data["memory"] == 192 * 10**9
    assert data["chosen"] in data["options"] and data["chosen"]["footprint"]["moment"] == "pass"
    assert data["command"].startswith("shot train 7B parallel.micro_tokens=") and data["ranks_that_fit"] is None
    less = json.loads(printed(capsys, "memory", "20B", "--ranks", "4", "--json"))
    assert not less["fits"] and less["ranks_that_fit"] == 8


def test_diff_shows_keys_and_costs_side_by_side(capsys):
    out = printed(capsys, "diff", "125M", "350M")
    for word in ("model.layers", "12", "24", "125,849,856", "345,"):
        assert word in out
    assert "No key differs" in printed(capsys, "diff", "demo", "demo")
    data = json.loads(printed(capsys, "diff", "demo", "demo", "checkpoint.keep=5", "--json"))
    assert data["keys"] == [{"key": "checkpoint.keep", "a": 2, "b": 5}] and data["same_run"]


def test_list_and_keys(capsys):
    assert [line.split()[0] for line in printed(capsys, "list").splitlines()][:2] == ["demo", "10M"]
    assert json.loads(printed(capsys, "list", "--json"))[0]["name"] == "demo"
    assert "model.layers  (int, default 6)\n    Blocks." in printed(capsys, "keys")
    assert {"name", "type", "default", "doc"} == set(json.loads(printed(capsys, "keys", "--json"))[0])
