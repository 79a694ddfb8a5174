from dataclasses import replace

import numpy as np
import pytest
from data_helpers import recipe_for, write_jsonl

from calledshot.data import Infilling, prepare
from calledshot.recipe import UsageError
from calledshot.recipe.schema import Batch, Objective, Source

LENGTHS = 20, 8, 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    write_jsonl(lab / "a.jsonl", 120)
    recipe = recipe_for(Source(path=str(lab / "a.jsonl"), language_field="lang"), context=64, held_out=0.3)
    return prepare(recipe, lab), recipe


def infilling(prepared, topology="decoder", kind="ul2", count=40, lengths=LENGTHS, context=64) -> Infilling:
    opened, recipe = prepared
    model = replace(recipe.model, topology=topology, context=context)
    recipe = replace(recipe, model=model, objective=Objective(kind=kind), batch=Batch(tokens=256))
    return Infilling(opened, recipe, "a", count, lengths)


def read(made: Infilling, gap: bool, rows: int = 3):
    """(what is given, targets with loss) of each triple, read off the batches."""
    found = []
    for batch in made.batches(gap, rows):
        for row in range(rows):
            for piece in range(int(batch.documents[row].max()) + 1):
                here = batch.documents[row] == piece
                loss = batch.loss_weights[row] > 0
                given = batch.inputs[row, here & ~loss & (np.cumsum(loss * here) == 0)].tolist()
                if batch.encoded is not None:
                    given = batch.encoded.inputs[row, batch.encoded.documents[row] == piece].tolist()
                found.append((given, batch.targets[row, here & loss].tolist()))
    return found


@pytest.mark.parametrize("topology", ["decoder", "prefix", "encoder-decoder"])
def test_the_middle_is_predicted_from_both_sides_or_from_the_left(prepared, topology):
    made = infilling(prepared, topology)
    special, sentinel = prepared[0].tokenizer.special, prepared[0].tokenizer.sentinels[0]
    left, middle, right = LENGTHS
    assert made.ids.shape == (40, 1 + sum(LENGTHS))
    for (given, targets), ids in zip(read(made, gap=True), made.ids.tolist(), strict=True):
        assert targets == ids[1 + left : 1 + left + middle]
        # Gaps of 8 at a low rate are R's.
        sides = [special["<|R|>"], *ids[: 1 + left], sentinel, *ids[-right:]]
        assert given[: len(sides)] == sides and given[len(sides) :] in ([], [sentinel])
    for (given, targets), ids in zip(read(made, gap=False), made.ids.tolist(), strict=True):
        assert targets == ids[1 + left : 1 + left + middle]
        assert [*given, *ids[len(given) - 1 : left + 1]] == [special["<|S|>"], *ids[: 1 + left]]
        assert len(given) >= left + 1


def test_triples_are_text_of_their_documents_the_same_for_all_and_more_add_to_fewer(prepared):
    made = infilling(prepared)
    tokenizer, source = prepared[0].tokenizer, prepared[0].sources[0]
    documents = {}
    for shard in source.held_out.shards:
        ids = np.fromfile(prepared[0].path / f"{shard.stem}.bin", prepared[0].dtype)
        parts = np.split(ids, np.cumsum(shard.index(prepared[0].path)["ids"])[:-1])
        documents |= dict(zip(shard.names(prepared[0].path), parts, strict=True))
    starts = made.select(gap=True).pieces["start"].tolist()
    places = list(zip(made.names, starts, strict=True))
    assert len(set(places)) == 40
    for (name, start), ids, size in zip(places, made.ids, made.bytes.tolist(), strict=True):
        assert ids.tolist() == documents[name][start : start + len(ids)].tolist()
        assert tokenizer.end not in ids.tolist()
        assert size == len(tokenizer.decode_bytes(ids[21:29].tolist()))
    other = infilling(prepared, "encoder-decoder", "span", count=60)
    assert np.array_equal(other.ids[:40], made.ids) and len(other.ids) > 40


@pytest.mark.parametrize("gap", [True, False])
def test_nats_are_of_the_middle_alone(prepared, gap):
    made = infilling(prepared, kind="span")
    selection = made.select(gap)
    nats, row = np.zeros(40), 0
    for batch in made.batches(gap, 3):
        nats += selection.nats_by_document(row, batch, batch.targets)
        row += 3
    assert nats.tolist() == made.ids[:, 21:29].sum(axis=1).tolist()
    score = selection.score(nats)
    assert (score.tokens, score.bytes, score.documents) == (40 * 8, made.bytes.sum(), 40)


def test_what_cannot_be_asked_is_refused(prepared):
    with pytest.raises(UsageError, match="no held-out document of a has 3,000 tokens"):
        infilling(prepared, lengths=(1000, 1000, 1000))
    with pytest.raises(UsageError, match=r"20 tokens, a gap of 8 and 12 more do not fit into model.context = 40"):
        infilling(prepared, context=40).select(gap=True)
    with pytest.raises(UsageError, match="never learned to fill gaps"):
        infilling(prepared, kind="causal").select(gap=True)
    assert infilling(prepared, kind="causal").select(gap=False).tokens == 40 * 8
