from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import recipe_for, write_jsonl

from calledshot.data import Batches, prepare
from calledshot.recipe import RunError, UsageError
from calledshot.recipe.schema import Phase, Ramp, Source

A, B = Source(path="a.jsonl", language_field="lang"), Source(path="b.jsonl", weight=3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab")
    write_jsonl(path / "a.jsonl", 150)
    write_jsonl(path / "b.jsonl", 70, seed=1, longest=40)
    return path


def batches(lab, *sources, steps=None, skips=(), **options) -> Batches:
    recipe = recipe_for(*(sources or (A,)), **options)
    return Batches(prepare(recipe, lab), recipe, steps, skips)


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def documents(made: Batches, source: int = 0) -> list[np.ndarray]:
    found = []
    for shard in made.prepared.sources[source].train.shards:
        ids = np.fromfile(made.prepared.path / f"{shard.stem}.bin", made.prepared.dtype)
        found += np.split(ids, np.cumsum(shard.index(made.prepared.path)["ids"])[:-1])
    return found


@pytest.mark.parametrize("context", [8, 32, 300])
def test_an_epoch_predicts_every_token_but_begin_once_from_all_before_it_in_its_piece(lab, context):
    made = batches(lab, context=context, rows=1)
    begin = made.prepared.tokenizer.begin
    expected = Counter()
    for ids in documents(made):
        for t in range(1, len(ids)):
            piece_start = (t - 1) // context * context
            expected[tuple(ids[piece_start : t + 1].tolist())] += 1
    for epoch in range(2):
        seen = Counter()
        for step in range(epoch * made.plans[0].rows, (epoch + 1) * made.plans[0].rows):
            batch = made.batch(step)
            for t in np.flatnonzero(batch.loss_weights[0]):
                start = t - batch.positions[0, t]
                assert (batch.documents[0, start : t + 1] == batch.documents[0, t]).all()
                seen[*batch.inputs[0, start : t + 1].tolist(), int(batch.targets[0, t])] += 1
                assert batch.targets[0, t] != begin
        assert seen == expected


def test_a_batch_depends_on_the_step_alone(lab):
    made = batches(lab, A, B)
    later = [made.batch(step) for step in (5, 3, 8)]
    again = batches(lab, A, B)
    assert all(same(batch, again.batch(step)) for step, batch in zip((5, 3, 8), later, strict=True))
    assert not same(batches(lab, A, B, seed=1).batch(3), later[1])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_out_the_same_rows(lab, ranks):
    made = batches(lab, A, B, rows=4)
    whole, share = made.batch(6), 4 // ranks
    parts = [made.rows(6, rank * share, (rank + 1) * share) for rank in range(ranks)]
    for name, array in vars(whole).items():
        assert array is None or np.array_equal(array, np.concatenate([getattr(part, name) for part in parts]))


def test_weights_are_shares_of_the_sequences(lab):
    made = batches(lab, A, B, rows=4)
    drawn = Counter(np.concatenate([made.batch(step).sources for step in range(50)]).tolist())
    assert drawn[1] == pytest.approx(150, abs=1)
    progress = made.progress(50)
    assert progress["b"] == drawn[1] / made.plans[1].rows and progress["a"] == drawn[0] / made.plans[0].rows


def test_phases_begin_at_their_share_of_the_run(lab):
    made = batches(lab, A, B, steps=40, phases=(Phase(0.5, {"a": 0}), Phase(0.75, {"a": 1, "b": 0})))
    sources = [set(made.batch(step).sources.tolist()) for step in range(40)]
    assert sources[:20] == [{0, 1}] * 20 and sources[20:30] == [{1}] * 10 and sources[30:] == [{0}] * 10


def test_max_epochs_hands_the_share_on_and_then_ends_the_data(lab):
    once = replace(B, max_epochs=1.0)
    made = batches(lab, replace(A, max_epochs=2.0), once, rows=1, steps=1)
    a, b = made.plans
    assert made.steps_available == 2 * a.rows + b.rows
    assert Counter(int(made.batch(step).sources[0]) for step in range(made.steps_available)) == {
        0: 2 * a.rows,
        1: b.rows,
    }
    with pytest.raises(UsageError, match=r"max_epochs is reached"):
        made.batch(made.steps_available)
    with pytest.raises(UsageError, match=rf"max_epochs leaves .* tokens \({made.steps_available:,} steps\)"):
        batches(lab, replace(A, max_epochs=2.0), once, rows=1, steps=made.steps_available + 1)
    assert batches(lab, A, once, rows=1, steps=10**6).steps_available is None


def test_skipped_batches_move_the_following_ones_up(lab):
    plain = batches(lab)
    skipping = batches(lab, skip=(2, 3), skips=(5,))
    numbers = [0, 1, 4, 6, 7, 8]
    assert [skipping.number(step) for step in range(6)] == numbers
    assert all(same(skipping.batch(step), plain.batch(number)) for step, number in enumerate(numbers))


def test_origins_name_the_documents_of_each_row(lab):
    made = batches(lab, A, B, context=64)
    texts = {}
    for position, source in enumerate(made.prepared.sources):
        names = [name for shard in source.train.shards for name in shard.names(made.prepared.path)]
        texts |= dict(zip(names, documents(made, position), strict=True))
    for step in range(4):
        batch = made.batch(step)
        for row, origins in enumerate(made.origins(step)):
            assert len(origins) == batch.documents[row].max() + 1
            for piece, origin in enumerate(origins):
                assert origin.source == made.prepared.sources[batch.sources[row]].name
                expected = texts[origin.document][origin.start : origin.start + origin.pairs]
                assert batch.inputs[row, batch.documents[row] == piece].tolist() == expected.tolist()
                assert origin.language == (
                    "und" if origin.source == "b" else "de" if int(origin.document[2:]) % 3 == 0 else "en"
                )


def test_prefetch_gives_the_same_batches_and_says_what_went_wrong(lab, tmp_path):
    made = batches(lab)
    fetched = list(made.prefetch(3, 9))
    assert [step for step, _ in fetched] == list(range(3, 9))
    assert all(same(batch, made.batch(step)) for step, batch in fetched)
    assert all(len(batch.inputs) == 2 for _, batch in made.prefetch(0, 3, share=lambda rows: (1, 3)))
    write_jsonl(tmp_path / "c.jsonl", 50)
    broken = batches(tmp_path, Source(path="c.jsonl"))
    shard = broken.prepared.path / f"{broken.prepared.sources[0].train.shards[0].stem}.bin"
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(RunError, match=rf"{shard.name}: corrupt: ends at byte"):
        list(broken.prefetch(0, 30))


def test_a_corpus_smaller_than_a_batch_is_refused(lab):
    with pytest.raises(
        UsageError, match=r"training tokens fill \d+ sequences of 128, less than one batch of 4096: lower"
    ):
        batches(lab, context=128, rows=4096)


def test_few_positions_are_lost_and_the_plan_is_made_once(lab):
    made = batches(lab, A, B, context=256)
    assert 0 <= made.packing_loss < 0.05
    path = made.plans[0].path
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    again = batches(lab, A, B, context=256, seed=9)
    assert again.plans == made.plans
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before
    # A plan cut short by a crash is made again.
    rows = path.with_suffix(".rows")
    content = rows.read_bytes()
    rows.write_bytes(content[:-8])
    batches(lab, A, B, context=256)
    assert rows.read_bytes() == content


def test_a_ramp_deals_the_same_sequences_out_in_smaller_batches(lab):
    """The order of a run's sequences does not know how they are dealt out, and a skipped batch is the one named."""
    whole = batches(lab, context=32, rows=6, steps=40)
    recipe = recipe_for(A, context=32, rows=6)
    ramp = (Ramp(2 * 32, 0.1), Ramp(3 * 32, 0.25))
    recipe = replace(
        recipe, batch=replace(recipe.batch, ramp=ramp), duration=replace(recipe.duration, tokens=240 * 32, flops=0.0)
    )
    made = Batches(prepare(recipe, lab), recipe)
    sizes = [made.size(step) for step in range(46)]
    assert sizes == [2] * 12 + [3] * 12 + [6] * 22
    rows = [row for step in range(46) for row in made.batch(step).inputs]
    expected = [row for step in range(32) for row in whole.batch(step).inputs]
    assert np.array_equal(rows, expected[: len(rows)])
    assert all(same(batch, made.batch(step)) for step, batch in made.prefetch(10, 14))
    assert [len(made.origins(step)) for step in (0, 12, 24)] == [2, 3, 6]
    halves = [batch for _, batch in made.prefetch(12, 13, share=lambda rows: (rows // 2, rows))]
    assert np.array_equal(halves[0].inputs, made.batch(12).inputs[1:])
    skipping = Batches(prepare(recipe, lab), recipe, skips=[11])
    assert [skipping.size(step) for step in (10, 11, 12)] == [2, 3, 3]
    assert same(skipping.batch(11), made.batch(12))
