"""Evaluations and exports killed at each thing they do to the file system."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from calledshot.evals import evaluate
from calledshot.model.huggingface import export_huggingface, load_huggingface
from calledshot.recipe import ShotError
from calledshot.training import load_model

sys.path.append(str(Path(__file__).parents[1] / "rundir"))
from rundir_crash import crashes


def test_a_killed_evaluation_leaves_no_half_answer(random_run, lab, tmp_path):
    (tmp_path / "a.txt").write_text("the model of the text")
    evaluation = evaluate(random_run, texts=[tmp_path / "a.txt"])
    evaluation.save()
    whole = random_run.evals()[evaluation.identifier]
    rows = random_run.eval_rows(evaluation.identifier)
    states = set()

    def earlier() -> None:
        evaluation.path.write_text(json.dumps({"answer": "earlier"}))
        evaluation.path.with_suffix(".jsonl").write_text('{"answer": "earlier"}\n')

    for _ in crashes(evaluation.save, earlier):
        summary = random_run.evals().get(evaluation.identifier, {})
        found = random_run.eval_rows(evaluation.identifier)
        if summary.get("answer") == "earlier":
            assert found == [{"answer": "earlier"}]
        elif summary:
            assert (summary["sources"], found) == (whole["sources"], rows)
        states.add(summary.get("answer", "whole" if summary else "none"))
    assert states == {"earlier", "none", "whole"}


@pytest.mark.parametrize("force", [False, True])
def test_a_killed_export_leaves_no_folder_that_loads_and_is_not_whole(random_run, tmp_path, force):
    loaded = load_model(random_run)
    folder, before = tmp_path / "exported", tmp_path / "before"
    config, tokenizer, new = loaded.recipe.model, loaded.tokenizer, loaded.model.state_dict()
    earlier = {name: tensor + 1 for name, tensor in new.items()}
    if force:
        export_huggingface(before, config, earlier, tokenizer, shard_bytes=50_000)

    def prepare() -> None:
        for left in (folder, *tmp_path.glob(".*")):
            shutil.rmtree(left, ignore_errors=True)
        if force:
            shutil.copytree(before, folder)

    states = set()
    for _ in crashes(lambda: export_huggingface(folder, config, new, tokenizer, force=force), prepare):
        try:
            _, found = load_huggingface(folder)
        except ShotError:
            states.add("none")
            continue
        whole = [name for name, one in (("earlier", earlier), ("new", new)) if same(found, one)]
        assert whole, "a mixture loads"
        assert (folder / "tokenizer.json").is_file()
        states.update(whole)
    assert states == ({"none", "earlier", "new"} if force else {"none", "new"})
    # What a killed one leaves under a hidden name goes with the next to the same place.
    (tmp_path / ".exported.0123456789ab.tmp").mkdir()
    export_huggingface(folder, config, new, tokenizer, force=True)
    assert not list(tmp_path.glob(".*"))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
