"""`shot data`: build, inspect and show, as a person in a lab uses them."""

import json
import random

import pytest

from calledshot.cli import main
from calledshot.data import Batches, Prepared
from calledshot.recipe import identity, load_recipe, to_toml
from calledshot.rundir import JsonLines, RunDirectory

RECIPE = """
[data]
held_out = 0.2
[[data.sources]]
path = "stories.jsonl"
language_field = "lang"
[model]
width = 64
heads = 2
kv_heads = 1
vocabulary = 700
context = 64
[batch]
tokens = 256
[duration]
tokens = 25600
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    with open("stories.jsonl", "w") as stream:
        for number in range(120):
            text = " ".join(
                chance.choice(("one", "two", "three", "dög", "\x1b[31mcat")) for _ in range(chance.randint(5, 120))
            )
            stream.write(json.dumps({"id": f"story-{number}", "text": text, "lang": ("en", "de")[number % 2]}) + "\n")
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "lab.toml").touch()
    return tmp_path


def run(capsys, *line: str, code: int = 0):
    assert main(["data", *line]) == code
    return capsys.readouterr()


def test_build_then_inspect(lab, capsys):
    with_error = run(capsys, "inspect", "r.toml", code=2)
    assert "`shot data build RECIPE` does it" in with_error.err and with_error.out == ""
    built = json.loads(run(capsys, "build", "r.toml", "--json").out)
    (source,) = built["sources"]
    assert source["train"]["documents"] + source["held_out"]["documents"] == 120
    assert set(source["train"]["languages"]) == {"de", "en"}
    assert 0 <= source["packing_loss"] < 0.1 and source["bytes_per_token"] > 1
    inspected = json.loads(run(capsys, "inspect", "r.toml", "--json", "--verify").out)
    assert inspected == {**built, "verified": True}
    text = run(capsys, "inspect", built["folder"], "--verify").out
    assert f"{source['train']['tokens']:,}" in text and "every hash is the manifest's" in text and "en " in text


def test_a_corrupt_shard_exits_1_and_names_the_file(lab, capsys):
    folder = json.loads(run(capsys, "build", "r.toml", "--json").out)["folder"]
    shard = next((lab / "data").glob("*/sources/*/train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    said = run(capsys, "inspect", folder, "--verify", code=1)
    assert shard.name in said.err and said.err.count("\n") == 1 and shard.read_bytes() == content


def test_bad_sources_exit_2_with_one_line(lab, capsys):
    (lab / "bad.txt").write_bytes(b"\xff\xfe")
    source = ("data.sources.0.language_field=", "data.sources.0.path=bad.txt")
    said = run(capsys, "build", "r.toml", *source, code=2).err.splitlines()
    assert said[-1].startswith("shot: ") and "bad.txt: not UTF-8 at byte 0" in said[-1]
    said = run(capsys, "build", "r.toml", "data.sources.0.text_field=body", code=2).err.splitlines()
    assert "no field 'body'; there are id, text, lang" in said[-1]


def test_show_prints_what_the_model_reads(lab, capsys):
    run(capsys, "build", "r.toml")
    out = run(capsys, "show", "r.toml", "--step", "3", "--rows", "4").out
    loaded = load_recipe("r.toml")
    batches = Batches(Prepared.open(next((lab / "data").glob("stories-*"))), loaded)
    decode = batches.prepared.tokenizer.decode
    batch, origins = batches.batch(2), batches.origins(2)
    for row in range(4):
        for piece, origin in enumerate(origins[row]):
            targets = batch.targets[row, batch.documents[row] == piece].tolist()
            assert origin.document in out
            assert decode(targets).replace("\x1b", "\u241b") in out
    assert "⟦<|begin|>⟧" in out and "\x1b" not in out
    shown = json.loads(run(capsys, "show", "r.toml", "--step", "3", "--rows", "4", "--json").out)
    assert [[piece["document"] for piece in row] for row in shown["rows"]] == [
        [o.document for o in row] for row in origins
    ]
    every = json.loads(run(capsys, "show", "r.toml", "--json", "batch.tokens=512").out)
    assert len(every["rows"]) == every["rows_in_batch"] == 8
    assert "steps count from 1" in run(capsys, "show", "r.toml", "--step", "0", code=2).err
    assert "--rows -1" in run(capsys, "show", "r.toml", "--rows", "-1", code=2).err


def test_show_marks_what_is_seen_both_ways_and_what_the_encoder_reads(lab, capsys):
    run(capsys, "build", "r.toml")
    prefix = ("objective.kind=prefix", "model.topology=prefix")
    out = run(capsys, "show", "r.toml", *prefix).out
    assert "; prefix 50%)" in out and "⟪<|begin|>" in out and "⟪…⟫ is 0, seen both ways" in out
    spans = ("objective.kind=span", "model.topology=encoder-decoder", "batch.tokens=512")
    out = run(capsys, "show", "r.toml", *spans).out
    assert "4 rows of 64 + 64" in out and "; span 15% by 3)" in out
    assert "«<|begin|>" in out and "⟦<|begin|>⟧<|sentinel_0|>" in out and "«…» is 0, read by the encoder" in out
    shown = json.loads(run(capsys, "show", "r.toml", *spans, "--json").out)
    piece = shown["rows"][0][0]
    assert "<|sentinel_0|>" in piece["inputs"] and piece["text"].startswith("<|begin|>")
    refused = run(capsys, "show", "r.toml", "model.topology=encoder-decoder", "batch.tokens=512", code=2).err
    assert "objective.kind = 'causal' has causal text, which gives an encoder nothing to read" in refused


def test_show_run_names_the_documents_under_a_spike(lab, capsys):
    run(capsys, "build", "r.toml")
    loaded = load_recipe("r.toml")
    prepared = Prepared.open(next((lab / "data").glob("stories-*")))
    made = RunDirectory.create(lab / "runs" / "spiky", recipe_toml=to_toml(loaded), identity=identity(loaded))
    made.save("data", prepared.record())
    with JsonLines(made.path / "skips.jsonl") as skips:
        skips.append({"step": 1})
    out = run(capsys, "show", "--run", "spiky", "--step", "2").out
    batches = Batches(prepared, loaded)
    # Batch 1 is skipped, so that the second step is trained on batch 2.
    expected = [origin for row in batches.origins(2) for origin in row]
    assert expected and all(origin.document in out for origin in expected)
    assert "data.skip = [2]" in out
    assert "there is no run 'none'" in run(capsys, "show", "--run", "none", code=2).err
    made.set_status(state="done", step=100, total_steps=100)
    assert "ends at step 100" in run(capsys, "show", "--run", "spiky", "--step", "101", code=2).err
