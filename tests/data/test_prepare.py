import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import recipe_for, story, write_jsonl

from calledshot.data import Prepared, Tokenizer, prepare, workers
from calledshot.data.prepare import locked
from calledshot.data.splitting import document_hash
from calledshot.recipe import RunError, UsageError, to_toml
from calledshot.recipe.schema import Source


def stored(prepared: Prepared) -> dict[str, dict[str, list[list[int]]]]:
    """Ids of every document, by split and id."""
    found = {}
    for source in prepared.sources:
        for name, split in (("train", source.train), ("held_out", source.held_out)):
            for shard in split.shards:
                ids = np.fromfile(prepared.path / f"{shard.stem}.bin", prepared.dtype)
                lengths = shard.index(prepared.path)["ids"]
                for document, part in zip(
                    shard.names(prepared.path), np.split(ids, np.cumsum(lengths)[:-1]), strict=True
                ):
                    found.setdefault(name, {})[document] = part.tolist()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def lab(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 120)
    return tmp_path


def test_shards_hold_every_document_between_begin_and_end(lab):
    prepared = prepare(recipe_for(Source(path="a.jsonl", language_field="lang"), held_out=0.2), lab)
    texts = {record["id"]: record["text"] for record in map(json.loads, (lab / "a.jsonl").read_text().splitlines())}
    found = stored(prepared)
    assert set(found["train"]) | set(found["held_out"]) == set(texts)
    assert set(found["held_out"]) == {name for name in texts if document_hash(name) < 0.2 * 2**64}
    tokenizer = prepared.tokenizer
    for name, ids in {**found["train"], **found["held_out"]}.items():
        assert ids == [tokenizer.begin, *tokenizer.encode(texts[name]), tokenizer.end]
    (source,) = prepared.sources
    assert source.train.bytes == sum(len(texts[name].encode()) for name in found["train"])
    assert source.train.tokens == sum(len(ids) - 1 for ids in found["train"].values())
    languages = source.train.languages(prepared.path)
    assert set(languages) == {"de", "en"} and sum(row["bytes"] for row in languages.values()) == source.train.bytes


def test_held_out_documents_stay_the_same_whatever_else_changes(lab, tmp_path):
    write_jsonl(lab / "b.jsonl", 50, seed=1)
    a, b = Source(path="a.jsonl"), Source(path="b.jsonl", weight=3)
    first = set(stored(prepare(recipe_for(a, b), lab))["held_out"])
    second = set(stored(prepare(recipe_for(b, a, seed=5, vocabulary=600), lab))["held_out"])
    assert first == second and {name[0] for name in first} == {"a", "b"}


def test_two_documents_are_enough_to_hold_one_out_and_one_is_not(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(story(number, 400))
    both = stored(prepare(recipe_for(Source(path="*.txt"), held_out=0.001), tmp_path))
    assert [len(both[split]) for split in ("train", "held_out")] == [1, 1]
    assert document_hash(*both["held_out"]) < document_hash(*both["train"])
    nearly_all = stored(prepare(recipe_for(Source(path="*.txt"), held_out=0.999999), tmp_path))
    assert nearly_all == {split: {name: nearly_all[split][name] for name in both[split]} for split in both}
    for share in (0.001, 0.999999):
        assert "held_out" not in stored(prepare(recipe_for(Source(path="0.txt"), held_out=share), tmp_path))


def test_the_tokenizer_has_not_seen_what_is_held_out(tmp_path):
    # A word that only held-out documents have cannot become a token.
    for number in range(60):
        held_out = document_hash(f"{number}.txt") < 0.3 * 2**64
        (tmp_path / f"{number}.txt").write_text(
            ((" xylophone" if held_out else " accordion") * 3 + story(number, 30)) * 3
        )
    tokenizer = prepare(recipe_for(Source(path="*.txt"), held_out=0.3), tmp_path).tokenizer
    assert len(tokenizer.encode(" accordion")) == 1 < len(tokenizer.encode(" xylophone"))


def test_what_is_prepared_is_reused_and_changes_make_another_folder(lab):
    recipe = recipe_for(Source(path="a.jsonl"))
    first = prepare(recipe, lab)
    before = {path: os.stat(path).st_mtime_ns for path in first.path.rglob("*")}
    weighted = recipe_for(Source(path="a.jsonl", weight=9, max_epochs=2), context=64, seed=3)
    assert prepare(weighted, lab).path == first.path
    os.utime(lab / "a.jsonl")
    assert prepare(recipe, lab).path == first.path
    assert {path: os.stat(path).st_mtime_ns for path in first.path.rglob("*")} == before
    others = {first.path}
    others.add(prepare(recipe_for(Source(path="a.jsonl"), held_out=0.1), lab).path)
    others.add(prepare(recipe_for(Source(path="a.jsonl"), vocabulary=720), lab).path)
    others.add(prepare(recipe_for(Source(path="a.jsonl", language="en")), lab).path)
    write_jsonl(lab / "a.jsonl", 121)
    others.add(prepare(recipe, lab).path)
    assert len(others) == 5


def test_many_processes_give_the_same_bytes_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("calledshot.data.readers.SMALLEST_CHUNK", 20_000)
    write_jsonl(tmp_path / "a.jsonl", 300)
    recipe = recipe_for(Source(path="a.jsonl"))
    alone = prepare(recipe, tmp_path)
    content = files(alone.path)
    shutil.rmtree(alone.path)
    monkeypatch.setattr(workers, "ALONE", 0)
    monkeypatch.setattr(workers, "_cores", lambda: 3)
    seen = []
    assert files(prepare(recipe, tmp_path, lambda *told: seen.append(told)).path) == content
    assert len([name for name in content if name.endswith(".bin")]) > 10
    reading = [(done, total) for stage, done, total in seen if stage == "tokens"]
    assert reading == sorted(reading) and reading[-1][0] == reading[-1][1] == (tmp_path / "a.jsonl").stat().st_size


def test_an_error_far_inside_a_file_is_told_as_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("calledshot.data.readers.SMALLEST_CHUNK", 20_000)
    monkeypatch.setattr(workers, "ALONE", 0)
    write_jsonl(tmp_path / "a.jsonl", 300)
    recipe = recipe_for(Source(path="a.jsonl"), tokenizer="given.json")
    prepare(recipe_for(Source(path="a.jsonl")), tmp_path).tokenizer.save(tmp_path / "given.json")
    with open(tmp_path / "a.jsonl", "a") as stream:
        stream.write('{"body": 1}\n')
    before = set((tmp_path / "data").iterdir())
    for one in (recipe, recipe_for(Source(path="a.jsonl"))):
        with pytest.raises(UsageError, match="no field 'text'; there are body"):
            prepare(one, tmp_path)
    for folder in set((tmp_path / "data").iterdir()) - before:
        assert list(folder.glob("sources/*/chunk-*.json")), "only what others can go on from is left"


def test_documents_that_all_have_one_id_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for name in ("x", "y", "z"):  # some are held out by chance, some not
        path.write_text("".join(json.dumps({"id": name, "text": f"text {n}"}) + "\n" for n in range(60)))
        with pytest.raises(UsageError, match=rf"a\.jsonl: all 60 documents have the id '{name}'.*`id_field`"):
            prepare(recipe_for(Source(path=str(path))), tmp_path)
    path.write_text(json.dumps({"id": "x", "text": "alone"}) + "\n")
    assert prepare(recipe_for(Source(path=str(path))), tmp_path).sources[0].train.documents == 1


def test_what_failed_before_anything_was_done_leaves_nothing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", 60)
    path.write_text(path.read_text() + "not JSON\n")
    with pytest.raises(UsageError, match="not a JSON object"):
        prepare(recipe_for(Source(path=str(path))), tmp_path)
    assert list((tmp_path / "data").iterdir()) == []
    write_jsonl(tmp_path / "a.jsonl", 60)
    monkeypatch.setattr(Tokenizer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe_for(Source(path=str(path))), tmp_path)
    assert list((tmp_path / "data").iterdir()) == []


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_who_waits_for_a_preparation_that_fails_makes_its_own(tmp_path):
    folder = tmp_path / "data" / "a"
    held, waited = threading.Event(), []

    def wait() -> None:
        held.set()
        with locked(folder):
            waited.append((folder / "lock").exists())

    with locked(folder):
        waiting = threading.Thread(target=wait)
        waiting.start()
        held.wait()
        time.sleep(0.1)
        shutil.rmtree(folder)
    waiting.join(10)
    assert waited == [True]


SCRIPT = """
import sys, tomllib
from calledshot.data import prepare, readers, workers
from calledshot.recipe import from_dict
readers.SMALLEST_CHUNK = 60_000
workers.ALONE = int(sys.argv[3])
recipe = from_dict(tomllib.loads(open(sys.argv[1]).read()), file=sys.argv[1])
print(prepare(recipe, sys.argv[2]).path)
"""


def start(recipe, lab: Path, alone: int = 0) -> subprocess.Popen:
    (lab / "recipe.toml").write_text(to_toml(recipe))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(lab / "recipe.toml"), str(lab), str(alone)], stdout=subprocess.PIPE, cwd=lab
    )


def test_a_killed_preparation_continues_where_it_was(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", 4000)
    recipe = recipe_for(Source(path=str(tmp_path / "a.jsonl")))
    process = start(recipe, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("data/*/sources/*/chunk-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "data").glob("a-*")
    markers = list(folder.glob("sources/*/chunk-*.json"))
    assert process.returncode == -signal.SIGKILL and markers and not (folder / "manifest.json").exists()
    left = {path: path.stat().st_mtime_ns for path in markers}
    # A finished chunk that was damaged meanwhile is not believed.
    damaged = markers[0].with_name(markers[0].stem.replace("chunk", "train") + "-00.bin")
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"xx")
    with start(recipe, tmp_path) as again:
        assert again.wait() == 0
    kept = [path for path, changed in left.items() if path.stat().st_mtime_ns == changed]
    assert len(kept) == len(left) - 1
    resumed = files(folder)
    shutil.rmtree(folder)
    with start(recipe, tmp_path) as whole:
        assert whole.wait() == 0
    assert files(folder) == resumed


def test_two_processes_at_once_make_it_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 3000)
    recipe = recipe_for(Source(path=str(tmp_path / "a.jsonl")))
    both = [start(recipe, tmp_path, alone=1 << 40) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and told[0] == told[1]
    Prepared.open(told[0].decode().strip(), verify=True)


def test_a_corrupt_shard_is_named_kept_and_made_anew_once_deleted(lab, monkeypatch):
    monkeypatch.setattr("calledshot.data.prepared._verified", set())
    recipe = recipe_for(Source(path="a.jsonl"))
    prepared = prepare(recipe, lab)
    content = files(prepared.path)
    shard = prepared.path / f"{prepared.sources[0].train.shards[0].stem}.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[random.Random(0).randrange(len(damaged))] ^= 1
    shard.write_bytes(damaged)
    prepare(recipe, lab)  # this process has checked the hashes already
    for opening in (lambda: Prepared.open(prepared.path, verify=True), lambda: reopened(recipe, lab, monkeypatch)):
        with pytest.raises(RunError, match=rf"{shard.name}: corrupt: its hash .* delete that file and run"):
            opening()
    shard.write_bytes(damaged[:-4])
    with pytest.raises(RunError, match=rf"{shard.name}: corrupt: \d+ bytes where the manifest says"):
        prepare(recipe, lab)
    assert shard.read_bytes() == damaged[:-4]
    shard.unlink()
    prepare(recipe, lab)
    assert files(prepared.path) == content


def reopened(recipe, lab, monkeypatch):
    monkeypatch.setattr("calledshot.data.prepared._verified", set())
    prepare(recipe, lab)


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(tmp_path):
    lab = tmp_path / "small"
    lab.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", lab], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        path = write_jsonl(tmp_path / "a.jsonl", 1500)
        recipe = recipe_for(Source(path=str(path)))
        with pytest.raises(RunError, match="the disk is full; free some"):
            prepare(recipe, lab)
        subprocess.run(["mount", "-o", "remount,size=8m", lab], check=True)
        assert prepare(recipe, lab).sources[0].train.documents > 1000
    finally:
        subprocess.run(["umount", lab], check=True)


def test_what_cannot_be_used_is_said_before_anything_is_written(lab):
    cases = [
        (recipe_for(Source(path="a.jsonl"), vocabulary=300), r"model\.vocabulary: 300"),
        (recipe_for(Source(path="a.jsonl"), vocabulary=0), r"model\.vocabulary: 0"),
        (recipe_for(Source(path="a.jsonl"), tokenizer="none.json"), r"data\.tokenizer: .*none\.json: no such file"),
    ]
    for recipe, complaint in cases:
        with pytest.raises(UsageError, match=complaint):
            prepare(recipe, lab)
    assert not list((lab / "data").glob("*/manifest.json"))


def test_a_given_tokenizer_is_copied_and_must_fit_the_model(lab):
    recipe = recipe_for(Source(path="a.jsonl"))
    trained = prepare(recipe, lab).tokenizer
    trained.save(lab / "given.json")
    given = replace(recipe, data=replace(recipe.data, tokenizer="given.json"))
    prepared = prepare(replace(given, model=replace(given.model, vocabulary=0)), lab)
    assert (prepared.path / "tokenizer.json").read_text() == trained.to_json()
    with pytest.raises(UsageError, match=rf"model\.vocabulary: 550 is less than the tokenizer's {trained.size}"):
        prepare(replace(given, model=replace(given.model, vocabulary=550)), lab)
