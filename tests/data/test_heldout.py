import json
import math
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import recipe_for, story, write_jsonl

from calledshot.data import HeldOut, prepare
from calledshot.data.splitting import document_hash
from calledshot.recipe import UsageError
from calledshot.recipe.schema import Batch, Denoiser, Objective, Source


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    write_jsonl(lab / "a.jsonl", 200)
    (lab / "one.txt").write_text(story(0, 300))
    recipe = recipe_for(
        Source(path=str(lab / "a.jsonl"), language_field="lang"), Source(path=str(lab / "one.txt")), held_out=0.3
    )
    made = HeldOut(prepare(recipe, lab), recipe)
    made.recipe = recipe
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


MODED = (Denoiser("prefix", mode="S"), Denoiser("span", mode="R"))
MODELS = {
    "decoder": ("decoder", Objective()),
    "prefix": ("prefix", Objective(kind="prefix")),
    "encoder-decoder": ("encoder-decoder", Objective(kind="prefix")),
    "ul2 decoder": ("decoder", Objective(kind="ul2")),
    "ul2 encoder-decoder": ("encoder-decoder", Objective(kind="mixture", denoisers=MODED)),
    "span decoder": ("decoder", Objective(kind="span")),
    "span encoder-decoder": ("encoder-decoder", Objective(kind="span")),
}


def model_of(held_out, name, context=48, encoder_context=0, **options) -> HeldOut:
    topology, objective = MODELS[name]
    shape = replace(held_out.recipe.model, topology=topology, context=context, encoder_context=encoder_context)
    tokens = 4 * (context + ((encoder_context or context) if topology == "encoder-decoder" else 0))
    recipe = replace(held_out.recipe, model=shape, objective=objective, batch=Batch(tokens=tokens))
    return HeldOut(held_out.prepared, recipe, **options)


def predicted(made: HeldOut, tokens=0, rows=3):
    """(document, start) of each piece → its targets with loss and all that is given, read off the batches."""
    selection, found, first = made.select("a", tokens), {}, 0
    for batch in made.batches("a", tokens, rows):
        assert batch.inputs.shape == (rows, made.context)
        found |= pieces_of(batch, selection, first)
        first += rows
    return selection, found


def pieces_of(batch, selection, first: int) -> dict:
    """The same of one batch, whose first row is that of the selection's number `first`."""
    found = {}
    for row in range(len(batch.inputs)):
        if first + row >= selection.rows:
            assert (batch.documents[row] == -1).all()
            continue
        pieces = selection.pieces[selection.row_starts[first + row] : selection.row_starts[first + row + 1]]
        for number, piece in enumerate(pieces):
            here = batch.documents[row] == number
            loss = batch.loss_weights[row] > 0
            given = batch.inputs[row, here].tolist()
            if batch.encoded is not None:
                given = batch.encoded.inputs[row, batch.encoded.documents[row] == number].tolist()
            name = selection.names[piece["document"]]
            found[name, int(piece["start"])] = batch.targets[row, here & loss].tolist(), given
    return found


@pytest.mark.parametrize("suffixes", [None, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_no_longer_than_they_need_be_hold_the_same(held_out, name, suffixes):
    if suffixes and name == "encoder-decoder":
        pytest.skip("it is asked for suffixes anyhow")
    options = {"context": 48, "encoder_context": 96 if "encoder" in name else 0, "suffixes": suffixes}
    selection, expected = predicted(model_of(held_out, name, **options))
    made = model_of(held_out, name, **options, shortest_row=16)
    short = made.select("a")
    longest = made.asking.frame.capacity
    assert set(short.lengths) <= {*range(16, longest, 16), longest} and len(set(short.lengths)) > 1
    assert short.tokens == selection.tokens and np.array_equal(short.bytes, selection.bytes)
    found, first = {}, 0
    for batch in made.batches("a", 0, 6):
        count, width = len(batch.inputs), int(short.lengths[first])
        # As many positions as six of the shortest rows, or a single row.
        assert count == 1 or count * width <= 6 * 16
        assert batch.inputs.shape[1] == min(width, 48)
        if batch.encoded is not None:
            assert batch.encoded.inputs.shape[1] == min(width, 96)
        found |= pieces_of(batch, short, first)
        first += count
    assert first == short.rows and found == expected


def test_short_documents_make_no_long_rows_in_a_long_context(held_out):
    """The rows of a model that reads 65,536 tokens are no longer than its documents want them."""
    made = model_of(held_out, "decoder", context=65_536, shortest_row=64)
    lengths = made.select("a").lengths
    assert max(lengths) < 1024 and sum(lengths) < 3 * made.select("a").tokens


def test_suffixes_are_the_same_for_every_topology_and_objective(held_out):
    expected = None
    tokenizer = held_out.prepared.tokenizer
    for name in MODELS:
        made = model_of(held_out, name, suffixes=True)
        selection, found = predicted(made, tokens=900)
        suffixes = {place: targets for place, (targets, _) in found.items()}
        expected = expected or suffixes
        assert suffixes == expected, name
        assert selection.tokens == sum(map(len, suffixes.values()))
        modes = {given[0] for _, given in found.values()} & {tokenizer.special[f"<|{mode}|>"] for mode in "RSX"}
        assert modes == ({tokenizer.special["<|S|>"]} if "ul2" in name else set())
        both_ways = any(batch.regions.any() for batch in made.batches("a", 900))
        assert both_ways == (name == "prefix")
        gaps = [tokenizer.sentinels[0] in given for _, given in found.values()]
        assert all(gaps) if "span" in name else not any(gaps)
    # Parts of each document: what is given and what is predicted make up its ids.
    _, found = predicted(model_of(held_out, "encoder-decoder"), tokens=900)
    for name in {name for name, _ in found}:
        pieces = [found[place] for place in sorted(found) if place[0] == name]
        text = [token for targets, given in pieces for token in [*given[1:], *targets]]
        assert text == [*tokenizer.encode(held_out.texts[name]["text"]), tokenizer.end]
    shares = [len(targets) / (len(targets) + len(given) - 1) for targets, given in found.values() if len(targets) > 9]
    assert 0.4 < np.mean(shares) < 0.6 and min(shares) > 0.24 and max(shares) < 0.78


def test_bytes_of_suffixes_are_those_of_the_predicted_text(held_out):
    made = model_of(held_out, "encoder-decoder")
    assert made.asking.suffixes and not model_of(held_out, "ul2 decoder").asking.suffixes
    for tokens in (0, 700):
        selection, found = predicted(made, tokens)
        tokenizer, expected = held_out.prepared.tokenizer, dict.fromkeys(selection.names, 0)
        for (name, _), (targets, _) in found.items():
            expected[name] += len(tokenizer.decode_bytes([token for token in targets if token != tokenizer.end]))
        assert dict(zip(selection.names, selection.bytes.tolist(), strict=True)) == expected
        assert (selection.bytes > 0).all()
        scored = selection.score(np.ones(len(selection.names)))
        assert scored.bytes == sum(expected.values()) and scored.tokens == selection.tokens
        # A token costs its own number of nats: each document is charged for its suffixes alone.
        nats = total(made, selection, tokens, 3, lambda batch: batch.targets)
        sums = dict.fromkeys(selection.names, 0)
        for (name, _), (targets, _) in found.items():
            sums[name] += sum(targets)
        assert dict(zip(selection.names, nats.astype(int).tolist(), strict=True)) == sums


def test_suffixes_of_other_contexts_can_be_cut_alike_and_what_does_not_fit_is_refused(held_out):
    wide = predicted(model_of(held_out, "decoder", 80, suffixes=True, piece=44))[1]
    uneven = predicted(model_of(held_out, "encoder-decoder", 40, encoder_context=64, piece=44))[1]
    assert {place: targets for place, (targets, _) in wide.items()} == {
        place: targets for place, (targets, _) in uneven.items()
    }
    with pytest.raises(UsageError, match=r"pieces of 45 tokens do not fit a context of 48"):
        model_of(held_out, "decoder", 48, suffixes=True, piece=45)
    with pytest.raises(UsageError, match=r"pieces of 80 tokens do not fit a context of 48 with an encoder's of 48"):
        model_of(held_out, "encoder-decoder", 48, piece=80)
    with pytest.raises(UsageError, match="an encoder-decoder predicts nothing without inputs"):
        model_of(held_out, "encoder-decoder", suffixes=False)


def test_a_model_with_modes_predicts_whole_documents_under_that_of_its_prefixes(held_out):
    made = model_of(held_out, "ul2 decoder")
    mode = held_out.prepared.tokenizer.special["<|S|>"]
    selection, found = predicted(made)
    assert selection.tokens == held_out.select("a").tokens and np.array_equal(
        selection.bytes, held_out.select("a").bytes
    )
    assert all(given[0] == mode for _, given in found.values())
    counted = total(made, selection, 0, 3, lambda batch: np.ones(batch.inputs.shape))
    assert counted.tolist() == (selection.ids - 1).tolist()
