"""Training batches of every objective and topology, through plans and shards."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from data_helpers import recipe_for, write_jsonl

from calledshot.data import Batches, prepare
from calledshot.data.inspection import segments
from calledshot.recipe import UsageError
from calledshot.recipe.schema import Batch, Denoiser, Objective, Source

A = Source(path="a.jsonl", language_field="lang")
B = Source(path="b.jsonl", weight=2)
TOPOLOGIES = {"decoder": {}, "prefix": {}, "encoder-decoder": {"encoder_context": 96}}
KINDS = ("prefix", "span", "ul2", "ul2r")
RATIOS = {"1:1": 64, "2:1": 128, "3:1": 192, "1:2": 32, "16:1": 1024}
"""Positions of an encoder beside a decoder's 64."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab")
    write_jsonl(path / "a.jsonl", 150)
    write_jsonl(path / "b.jsonl", 60, seed=1, longest=600)
    return path


def recipe(*sources, kind="ul2", topology="decoder", rows=4, steps=10, seed=0, encoder_context=None, **objective):
    plain = recipe_for(*sources, context=64, rows=rows, steps=steps, seed=seed)
    model = replace(plain.model, topology=topology, **TOPOLOGIES[topology])
    if encoder_context is not None:
        model = replace(model, encoder_context=encoder_context)
    tokens = rows * (64 + model.encoder_context)
    asked = Objective(kind=kind, **objective)
    duration = replace(plain.duration, tokens=steps * tokens)
    return replace(plain, model=model, objective=asked, batch=Batch(tokens=tokens), duration=duration)


def made(lab, *sources, **options) -> Batches:
    asked = recipe(*(sources or (A,)), **options)
    return Batches(prepare(asked, lab), asked)


def arrays(batch):
    found = {**vars(batch), **(vars(batch.encoded) if batch.encoded else {})}
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def text_of(batch, row, piece, tokenizer):
    """A piece's ids with its gaps filled, read off the batch; the end token left out where it closes gaps."""
    here = batch.documents[row] == piece
    targets = batch.targets[row, here]
    if batch.encoded is None:
        sequence = np.append(batch.inputs[row, here][:1], targets)
        given = int((batch.loss_weights[row, here] == 0).sum()) + 1
        inputs, targets = sequence[:given].tolist(), sequence[given:].tolist()
    else:
        inputs, targets = batch.encoded.inputs[row, batch.encoded.documents[row] == piece].tolist(), targets.tolist()
    if inputs[0] in [tokenizer.special[f"<|{mode}|>"] for mode in "RSX"]:
        del inputs[0]
    spans, open_span = {}, []
    for token in targets:
        if token in tokenizer.sentinels:
            open_span = spans[token] = []
        else:
            open_span.append(token)
    if not spans:
        return inputs + targets
    assert open_span.pop() == tokenizer.end
    return [text for token in inputs for text in spans.get(token, [token])]


@pytest.mark.parametrize(
    ("kind", "topology", "encoder_context"),
    [(kind, topology, None) for kind in KINDS for topology in TOPOLOGIES]
    + [(kind, "encoder-decoder", size) for kind in ("prefix", "ul2r") for size in RATIOS.values()],
)
def test_every_pass_has_every_token_once(lab, kind, topology, encoder_context):
    batches = made(lab, B, kind=kind, topology=topology, rows=1, encoder_context=encoder_context)
    tokenizer, step = batches.prepared.tokenizer, 0
    documents = {}
    for shard in batches.prepared.sources[0].train.shards:
        ids = np.fromfile(batches.prepared.path / f"{shard.stem}.bin", batches.prepared.dtype)
        parts = np.split(ids, np.cumsum(shard.index(batches.prepared.path)["ids"])[:-1])
        documents |= dict(zip(shard.names(batches.prepared.path), parts, strict=True))
    for epoch in range(3):
        seen = Counter()
        while (origins := batches.origins(step)[0])[0].epoch == epoch:
            batch = batches.batch(step)
            assert batch.documents.max() == len(origins) - 1
            for piece, origin in enumerate(origins):
                ids = documents[origin.document][origin.start : origin.start + origin.pairs + 1].tolist()
                text = text_of(batch, 0, piece, tokenizer)
                # Where gaps are filled, the end token says that they are, and not where the document ends.
                assert text == ids or (text == ids[:-1] and ids[-1] == tokenizer.end and "span" in origin.denoiser)
                seen[origin.document, origin.start, origin.pairs] += 1
            step += 1
        covered = {name: np.zeros(len(ids) - 1, int) for name, ids in documents.items()}
        for (name, start, pairs), count in seen.items():
            covered[name][start : start + pairs] += count
        assert all((counts == 1).all() for counts in covered.values())
    assert batches.progress(step) == {"b": 3.0}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", ["prefix", "mixture", "ul2", "ul2r"])
def test_prefixes_keep_their_rate_and_are_uniform_whatever_the_stacks(lab, kind, ratio):
    own = (Denoiser("prefix", weight=2, mode="S"), Denoiser("span", rate=0.3))
    options = {"denoisers": own} if kind == "mixture" else {}
    options |= {"rows": 40, "topology": "encoder-decoder", "encoder_context": RATIOS[ratio]}
    batches = made(lab, A, B, kind=kind, **options)
    (asked,) = (one for one in batches.denoising.denoisers if one.kind == "prefix")
    mode = batches.prepared.tokenizer.special["<|S|>"] if asked.mode else None
    places, targets, expected, step = [], 0, 0.0, 0
    chance = np.random.default_rng(0)
    while len(places) < 2500:
        batch = batches.batch(step)
        step += 1
        for row, read in enumerate(batch.encoded.documents):
            inputs, outputs = (np.bincount(all_of[all_of >= 0]) for all_of in (read, batch.documents[row]))
            first = batch.encoded.inputs[row, (batch.encoded.positions[row] == 0) & (read >= 0)]
            for piece in np.flatnonzero(first == mode) if asked.mode else range(len(first)):
                given, ids = (
                    int(inputs[piece]) - bool(asked.mode),
                    int(inputs[piece] + outputs[piece]) - bool(asked.mode),
                )
                least = max(1, round((1 - 2 * asked.rate) * (ids - 1)))
                targets += ids - given
                expected += ids - (least + ids - 1) / 2
                if ids > 8:
                    places.append((given - least + chance.random()) / (ids - least))
    assert targets / expected == pytest.approx(1, abs=0.01)
    fifth = len(places) / 5
    # The two of a couple are each other's mirror image: up to sqrt(2) times a fifth's own deviation.
    deviation = np.sqrt(2 * 0.8 * fifth)
    assert np.histogram(places, 5, (0, 1))[0] == pytest.approx(np.full(5, fifth), abs=4 * deviation)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_batch_depends_on_seed_and_step_alone_and_ranks_share_it_out(lab, topology):
    batches = made(lab, A, B, topology=topology)
    later = [batches.batch(step) for step in (5, 3, 40)]
    again = made(lab, A, B, topology=topology)
    other = made(lab, A, B, topology=topology, seed=1)
    for step, batch in zip((5, 3, 40), later, strict=True):
        parts = [again.rows(step, 0, 1), again.rows(step, 1, 2), again.rows(step, 2, 4)]
        for name, array in arrays(batch).items():
            assert np.array_equal(array, np.concatenate([arrays(part)[name] for part in parts])), name
        assert not np.array_equal(batch.inputs, other.batch(step).inputs)


def test_the_seed_corrupts_the_same_pieces_otherwise(lab):
    def pieces(seed):
        batches = made(lab, kind="span", rows=1, seed=seed)
        found = {}
        for step in range(batches.plans[0].rows):
            batch = batches.batch(step)
            for piece, origin in enumerate(batches.origins(step)[0]):
                here = (batch.documents[0] == piece) & (batch.loss_weights[0] > 0)
                found[origin.document, origin.start] = batch.targets[0, here].tolist()
        return found

    one, other = pieces(0), pieces(1)
    assert one.keys() == other.keys()
    # A single span, of a short piece, can only be the piece's end.
    several = [place for place, targets in one.items() if len(targets) > 6]
    assert len(several) > 150 and all(one[place] != other[place] for place in several)


def test_weights_are_shares_of_the_pieces_and_passes_change_them(lab):
    batches = made(lab, kind="ul2r", rows=1)
    asked, step = {}, 0
    while (origins := batches.origins(step)[0])[0].epoch < 4:
        for origin in origins:
            if origin.start == 0:
                asked.setdefault(origin.document, []).append(origin.denoiser)
        step += 1
    counts = Counter(denoiser for denoisers in asked.values() for denoiser in denoisers)
    total = counts.total()
    # Four passes are a quarter of the circle apart each, on which S has a half and R a quarter.
    assert total == 4 * len(asked)
    assert counts["prefix 25% S"] == total / 2 and counts["span 15% by 3 R"] == total / 4
    # The two X share the last quarter; standard deviation about sqrt(140) / 2 = 6.
    assert abs(counts["span 15% by 32 X"] - total / 8) < 25
    assert all(len(set(denoisers)) == 3 for denoisers in asked.values())


def test_rows_are_full(lab):
    for topology in ("decoder", "prefix"):
        for kind in KINDS:
            batches = made(lab, A, B, kind=kind, topology=topology)
            assert batches.packing_loss < 0.03, (topology, kind)
            padding = np.mean([(batches.batch(step).documents < 0).mean() for step in range(50)])
            assert padding == pytest.approx(batches.packing_loss, abs=0.02)


def test_encoder_and_decoder_share_the_padding_that_their_contexts_leave(lab):
    batches = made(lab, B, kind="prefix", topology="encoder-decoder")
    even = recipe(B, kind="prefix", topology="encoder-decoder")
    even = replace(even, model=replace(even.model, encoder_context=0), batch=Batch(tokens=4 * 128))
    # Half of the text is inputs: as many positions for them as for the targets leave next to no padding.
    assert Batches(batches.prepared, even).packing_loss < 0.03 < batches.packing_loss
    filled = batches.batch(0)
    used = (filled.documents >= 0).sum() + (filled.encoded.documents >= 0).sum()
    assert batches.context == 160 and batches.size(0) == 4
    assert used / (4 * 160) == pytest.approx(1 - batches.packing_loss, abs=0.1)


def test_prefixes_without_modes_share_the_causal_plan(lab):
    causal, prefix = made(lab, kind="causal"), made(lab, kind="prefix")
    assert causal.plans == prefix.plans
    assert [o.document for o in causal.origins(3)[0]] == [o.document for o in prefix.origins(3)[0]]
    assert np.array_equal(causal.batch(3).inputs, prefix.batch(3).inputs)
    predicted = [sum(batches.batch(step).tokens for step in range(30)) for batches in (prefix, causal)]
    assert predicted[0] / predicted[1] == pytest.approx(0.5, abs=0.05)


def test_max_epochs_ends_passes_of_several_plans(lab):
    mixed = (Denoiser("span", rate=0.5, mean_span=2, mode="X"), Denoiser("prefix"))
    options = {"kind": "mixture", "denoisers": mixed, "rows": 1, "steps": 1}
    batches = made(lab, replace(A, max_epochs=3.0), **options)
    rows = [batches._plan(0, epoch).rows for epoch in range(3)]
    assert rows[0] == rows[2] != rows[1] and batches.steps_available == sum(rows)
    epochs = Counter(batches.origins(step)[0][0].epoch for step in range(sum(rows)))
    assert epochs == dict(enumerate(rows))
    with pytest.raises(UsageError, match="max_epochs is reached"):
        batches.batch(sum(rows))
    half = made(lab, replace(A, max_epochs=1.5), **options)
    assert half.steps_available == rows[0] + rows[1] // 2


def test_a_row_is_shown_with_its_regions_and_what_the_encoder_reads(lab):
    batches = made(lab, B, kind="prefix", topology="prefix", rows=1)
    tokenizer, batch = batches.prepared.tokenizer, batches.batch(1)
    shown = [part for part in segments(batch, 0, tokenizer) if part.piece == 0]
    assert [(part.weight, part.region, part.encoded) for part in shown] == [(0, 1, False), (1, 0, False)]
    here = batch.documents[0] == 0
    whole = [*batch.inputs[0, here][:1].tolist(), *batch.targets[0, here].tolist()]
    assert "".join(token for part in shown for token in part.tokens) == tokenizer.decode(whole)
    assert sum(len(part.tokens) for part in shown[:1]) == batch.regions[0, here].sum()

    batches = made(lab, B, kind="ul2", topology="encoder-decoder", rows=1)
    batch = batches.batch(1)
    shown = [part for part in segments(batch, 0, tokenizer) if part.piece == 0]
    assert [(part.weight, part.encoded) for part in shown] == [(0, True), (0, False), (1, False)]
    read = batch.encoded.inputs[0, batch.encoded.documents[0] == 0].tolist()
    assert "".join(shown[0].tokens) == tokenizer.decode(read) and shown[1].tokens == ("<|begin|>",)
