import json
import math

import numpy as np
import pytest
from data_helpers import recipe_for, story, write_jsonl

from calledshot.data import HeldOut, prepare
from calledshot.data.splitting import document_hash
from calledshot.recipe import UsageError
from calledshot.recipe.schema import Source


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    write_jsonl(lab / "a.jsonl", 200)
    (lab / "one.txt").write_text(story(0, 300))
    recipe = recipe_for(
        Source(path=str(lab / "a.jsonl"), language_field="lang"), Source(path=str(lab / "one.txt")), held_out=0.3
    )
    made = HeldOut(prepare(recipe, lab), recipe)
    made.texts = {record["id"]: record for record in map(json.loads, (lab / "a.jsonl").read_text().splitlines())}
    return made


def total(held_out, selection, tokens, rows, nats_of):
    nats, first = np.zeros(len(selection.names)), 0
    for batch in held_out.batches("a", tokens, rows):
        assert batch.inputs.shape == (rows, held_out.context)
        nats += selection.nats_by_document(first, batch, nats_of(batch))
        first += rows
    return nats


@pytest.mark.parametrize("tokens", [0, 500])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_every_target_of_every_chosen_document_is_counted_once(held_out, tokens, rows):
    selection = held_out.select("a", tokens)
    counted = total(held_out, selection, tokens, rows, lambda batch: batch.loss_weights)
    tokenizer = held_out.prepared.tokenizer
    assert counted.tolist() == [len(tokenizer.encode(held_out.texts[name]["text"])) + 1 for name in selection.names]
    assert selection.tokens == counted.sum()
    # Each document gets its own targets: their sum tells documents apart.
    summed = total(held_out, selection, tokens, rows, lambda batch: batch.targets * batch.loss_weights)
    expected = [sum(tokenizer.encode(held_out.texts[name]["text"])) + tokenizer.end for name in selection.names]
    assert summed.tolist() == expected


def test_bits_per_byte_divide_by_the_bytes_of_just_these_texts(held_out):
    for tokens in (0, 700):
        selection = held_out.select("a", tokens)
        size = sum(len(held_out.texts[name]["text"].encode()) for name in selection.names)
        score = selection.score(np.full(len(selection.names), 2.0))
        assert score.bytes == size and score.documents == len(selection.names)
        assert score.bits_per_byte == pytest.approx(2 * len(selection.names) / math.log(2) / size)
        assert score.loss == pytest.approx(2 * len(selection.names) / selection.tokens)
        by_language = selection.score_by_language(np.arange(len(selection.names), dtype=float))
        assert set(by_language) == {"de", "en"}
        assert sum(part.bytes for part in by_language.values()) == size
        assert sum(part.tokens for part in by_language.values()) == selection.tokens
        german = [i for i, name in enumerate(selection.names) if held_out.texts[name]["lang"] == "de"]
        assert by_language["de"].nats == sum(german) and by_language["de"].documents == len(german)


def test_a_part_is_whole_documents_in_hash_order_and_grows(held_out):
    whole = held_out.select("a")
    order = sorted(whole.names, key=document_hash)
    previous = 0
    for tokens in (1, 300, 1000, 10**9):
        chosen = held_out.select("a", tokens)
        assert set(chosen.names) == set(order[: len(chosen.names)]) and len(chosen.names) >= previous
        assert tokens <= chosen.tokens or chosen.names == whole.names
        previous = len(chosen.names)
    assert held_out.select("a", 1).names == (order[0],)
    assert list(whole.names) == [name for name in held_out.texts if name in set(whole.names)]


def test_a_source_of_one_document_has_nothing_held_out(held_out):
    assert held_out.sources == ("a",)
    with pytest.raises(UsageError, match="one: a source of one document"):
        held_out.select("one")
    with pytest.raises(UsageError, match="no source is called 'two'; there are a, one"):
        held_out.select("two")
