"""Every objective in every topology: nothing lost, nothing leaked, the papers' numbers."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.objective import Denoising, Examples, Frame, Specials, causal, lay_out
from calledshot.recipe.objectives import CAUSAL, PREFIX, SHORTEST_CONTEXT, UL2, UL2R
from calledshot.recipe.schema import Denoiser

BEGIN, END, PAD = 1, 2, 3
SENTINELS = tuple(range(10, 266))
MODES = {"R": 4, "S": 5, "X": 6}
SPECIALS = Specials(BEGIN, END, PAD, SENTINELS, MODES)
TEXT = 1000
"""Ids of text are from here on."""

SPAN = (Denoiser("span"),)
MIXED = (Denoiser("causal"), Denoiser("causal", weight=0.5, mode="S"), Denoiser("prefix", rate=0.1), Denoiser("span"))
OBJECTIVES = {"causal": CAUSAL, "prefix": PREFIX, "span": SPAN, "ul2": UL2, "ul2r": UL2R, "mixture": MIXED}
FRAMES = {
    "decoder": Frame("decoder", 96, 0, SPECIALS),
    "prefix": Frame("prefix", 96, 0, SPECIALS),
    "encoder-decoder": Frame("encoder-decoder", 64, 80, SPECIALS),
    "pooled": Frame("encoder-decoder", 64, 80, SPECIALS, pooling=4),
}
ONE_STACK = ("decoder", "prefix")
PAIRS = [(o, t) for o in OBJECTIVES for t in FRAMES if t in ONE_STACK or o not in ("causal", "mixture")]


def drawn_rows(denoising, rng, rows=4):
    """Rows filled at random: pieces of distinct ids, some beginning and some ending their document."""
    pieces, tasks, unused = [], [], iter(range(TEXT, 10**7))
    for _ in range(rows):
        lasts: list[bool] = []
        pieces.append([])
        tasks.append([])
        for _ in range(40):
            task = int(rng.integers(len(denoising.denoisers)))
            pairs = int(rng.integers(1, denoising.cuts[task] + 1) ** rng.choice([1, 0.6]))
            last = bool(rng.integers(2)) and pairs > 1
            sizes = [len(piece) - 1 for piece in pieces[-1]] + [pairs]
            _, _, places = denoising.units(np.array([*tasks[-1], task]), np.array(sizes), np.array([*lasts, last]))
            if places.sum() > denoising.frame.capacity and pieces[-1]:
                continue
            lasts.append(last)
            ids = [next(unused) for _ in range(pairs + 1)]
            if rng.integers(2):
                ids[0] = BEGIN
            if last:
                ids[-1] = END
            pieces[-1].append(np.array(ids, np.uint16 if ids[-2] < 2**16 else np.uint32))
            tasks[-1].append(task)
    return pieces, tasks


def parts(batch, row, piece):
    """(inputs, targets) of a piece, read off the batch alone."""
    here = batch.documents[row] == piece
    targets = batch.targets[row, here].tolist()
    weights = batch.loss_weights[row, here]
    if batch.encoded is not None:
        assert (weights == 1).all() and batch.inputs[row, here].tolist() == [BEGIN, *targets[:-1]]
        return batch.encoded.inputs[row, batch.encoded.documents[row] == piece].tolist(), targets
    sequence = [int(batch.inputs[row, here][0]), *targets]
    assert batch.inputs[row, here].tolist() == sequence[:-1]
    given = int((weights == 0).sum()) + 1
    assert (weights[: given - 1] == 0).all() and (weights[given - 1 :] == 1).all()
    return sequence[:given], sequence[given:]


def filled_in(inputs, targets, spanned):
    """The text that an example was made from, after its mode token."""
    if inputs[0] in MODES.values():
        inputs = inputs[1:]
    if not spanned:
        return inputs + targets
    used = [token for token in inputs if token in SENTINELS]
    assert used == list(SENTINELS[: len(used)])
    assert [token for token in targets if token in SENTINELS] == used and targets[-1] == END
    cuts = [targets.index(token) for token in used] + [len(targets) - 1]
    spans = {token: targets[a + 1 : b] for token, (a, b) in zip(used, pairwise(cuts), strict=True)}
    assert all(spans.values())
    return [text for token in inputs for text in spans.get(token, [token])]


@pytest.mark.parametrize(("objective", "topology"), PAIRS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_inputs_and_targets_give_the_text_back_and_the_mode_is_the_tasks(objective, topology, seed):
    denoising = Denoising(OBJECTIVES[objective], FRAMES[topology])
    pieces, tasks = drawn_rows(denoising, np.random.default_rng(seed))
    batch = denoising.batch(pieces, tasks, range(len(pieces)), [7] * len(pieces))
    for row, (texts, row_tasks) in enumerate(zip(pieces, tasks, strict=True)):
        assert batch.documents[row].max() == len(texts) - 1
        for piece, (ids, task) in enumerate(zip(texts, row_tasks, strict=True)):
            asked, text = denoising.denoisers[task], ids.tolist()
            inputs, targets = parts(batch, row, piece)
            assert (inputs[0] == MODES[asked.mode]) if asked.mode else (inputs[0] == text[0])
            # The end of a document is no text to fill in; span corruption has an end of its own.
            spanned = asked.kind == "span"
            assert filled_in(inputs, targets, spanned) == (text[:-1] if spanned and text[-1] == END else text)
            assert BEGIN not in targets
        empty = batch.documents[row] == -1
        assert (batch.inputs[row, empty] == PAD).all() and not batch.loss_weights[row, empty].any()


@pytest.mark.parametrize(("objective", "topology"), PAIRS)
def test_no_target_is_visible_to_the_position_that_predicts_it(objective, topology):
    denoising = Denoising(OBJECTIVES[objective], FRAMES[topology])
    pieces, tasks = drawn_rows(denoising, np.random.default_rng(3), rows=6)
    batch = denoising.batch(pieces, tasks, range(len(pieces)), [0] * len(pieces))
    predicted = 0
    for row in range(len(pieces)):
        documents, regions, inputs = batch.documents[row], batch.regions[row], batch.inputs[row]
        for t in np.flatnonzero(batch.loss_weights[row]):
            target = batch.targets[row, t]
            if target < TEXT:  # sentinels, modes and ends come again; all other ids occur in one place of the rows
                continue
            predicted += 1
            keys = np.arange(len(inputs))
            seen = (documents == documents[t]) & ((keys <= t) | ((regions == regions[t]) & (regions[t] > 0)))
            visible = inputs[seen].tolist()
            if batch.encoded is not None:
                visible += batch.encoded.inputs[row, batch.encoded.documents[row] == documents[t]].tolist()
            assert target not in visible
    assert predicted > 50


def test_prefixes_are_seen_both_ways_in_the_prefix_topology_alone():
    for topology, seen in (("prefix", 1), ("decoder", 0)):
        denoising = Denoising(MIXED, FRAMES[topology])
        pieces, tasks = drawn_rows(denoising, np.random.default_rng(1))
        batch = denoising.batch(pieces, tasks, range(4), [0] * 4)
        for row in range(4):
            for piece, task in enumerate(tasks[row]):
                regions = batch.regions[row, batch.documents[row] == piece].tolist()
                given = len(parts(batch, row, piece)[0])
                both = 0 if MIXED[task].kind == "causal" else seen
                assert regions == [both] * given + [0] * (len(regions) - given)


def test_plain_causal_denoising_is_the_causal_objective():
    pieces, tasks = drawn_rows(Denoising(CAUSAL, FRAMES["decoder"]), np.random.default_rng(0))
    made = Denoising(CAUSAL, FRAMES["decoder"]).batch(pieces, tasks, range(4), range(4))
    expected = causal(pieces, range(4), 96, PAD)
    for name, array in vars(expected).items():
        found = getattr(made, name)
        assert (array is None and found is None) or (found.dtype == array.dtype and np.array_equal(found, array)), name


@pytest.mark.parametrize(
    ("room", "mean", "rate", "tokens", "targets", "spans"),
    [
        *((512, 3, 0.15, 568, 114, 28), (512, 8, 0.15, 588, 100, 11), (512, 3, 0.5, 766, 512, 128)),
        *((512, 8, 0.5, 908, 512, 57), (512, 64, 0.15, 600, 92, 1), (512, 64, 0.5, 1006, 512, 8)),
        *((512, 32, 0.15, 598, 94, 3), (128, 3, 0.15, 141, 29, 7), (128, 3, 0.5, 190, 128, 32)),
        # From the tests of T5.
        *((64, 2, 0.2, 70, 22, 7), (64, 1, 0.2, 63, 27, 13)),
    ],
)
def test_lengths_are_those_of_t5s_random_spans_helper(room, mean, rate, tokens, targets, spans):
    """T5's EOS at the end of the inputs is here the id before the piece at their beginning."""
    denoising = Denoising(
        (Denoiser("span", rate=rate, mean_span=mean),), Frame("encoder-decoder", room, room, SPECIALS)
    )
    assert denoising.cuts.tolist() == [tokens]
    batch = denoising.batch([[np.arange(TEXT, TEXT + tokens + 1)]], [[0]], [0], [0])
    assert batch.tokens == targets and (batch.targets >= 10).sum() - (batch.targets >= TEXT).sum() == spans
    assert room - (batch.encoded.documents < 0).sum() in (room, room - 1)


def test_the_sentinels_never_run_out():
    for denoiser in (Denoiser("span", rate=0.5), Denoiser("span", rate=0.5, roll=True)):
        denoising = Denoising((denoiser,), Frame("decoder", 9000, 0, SPECIALS))
        cut = int(denoising.cuts[0])
        # Half of 1,538 tokens is 769, which are 256 spans of 3; one token more rounds to 257. Rotation may part one.
        assert cut == (1533 if denoiser.roll else 1538)
        pieces = [[np.arange(TEXT, TEXT + cut + 1) for _ in range(3)]]
        for seed in range(20):
            batch = denoising.batch(pieces, [[0, 0, 0]], [seed], [0])
            for piece in range(3):
                used = [token for token in parts(batch, 0, piece)[0] if token in SENTINELS]
                assert len(used) == len(set(used)) in (256, 256 - denoiser.roll)
    few = Denoising(SPAN, Frame("prefix", 96, 0, replace(SPECIALS, sentinels=SENTINELS[:2])))
    assert few.cuts[0] < 60 and Denoising(SPAN, FRAMES["prefix"]).cuts[0] > 80


@pytest.mark.parametrize("topology", FRAMES)
def test_rates_and_mean_spans_are_the_tables(topology):
    wide = replace(FRAMES[topology], context=1024, encoder_context=1024 if topology == "encoder-decoder" else 0)
    for mixture in (UL2, UL2R):
        denoising = Denoising(mixture, wide)
        for task, asked in enumerate(mixture):
            cut = int(denoising.cuts[task])
            pieces = [[np.arange(TEXT, TEXT + cut + 1)] for _ in range(400 if asked.kind == "prefix" else 30)]
            batch = denoising.batch(pieces, [[task]] * len(pieces), range(len(pieces)), [0] * len(pieces))
            taken = np.array([sum(t >= TEXT for t in parts(batch, row, 0)[1]) for row in range(len(pieces))])
            spans = [sum(t in SENTINELS for t in parts(batch, row, 0)[1]) for row in range(len(pieces))]
            if asked.kind == "prefix":
                # Uniform over half of the piece: standard deviation 1 / sqrt(12) of that half.
                assert taken.mean() / (cut + 1) == pytest.approx(asked.rate, abs=4 * 0.5 / np.sqrt(12 * 400))
                assert taken.min() < 0.02 * cut and taken.max() > 0.48 * cut and taken.max() <= 0.5 * cut + 1
            else:
                assert taken / cut == pytest.approx(np.full(30, asked.rate), abs=0.6 / cut)
                # The number of spans is rounded; rotation may part one in two.
                count = taken[0] / asked.mean_span
                assert set(np.array(spans) - max(round(count), 1)) <= ({0, 1} if asked.roll else {0})


def test_rotation_lets_a_piece_begin_and_end_either_way():
    denoising = Denoising((Denoiser("span", rate=0.4, roll=True),), FRAMES["decoder"])
    pieces = [[np.arange(TEXT, TEXT + 41)] for _ in range(200)]
    batch = denoising.batch(pieces, [[0]] * 200, range(200), [0] * 200)
    inputs = [parts(batch, row, 0)[0] for row in range(200)]
    begins, ends = (sum(tokens[place] in SENTINELS for tokens in inputs) for place in (1, -1))
    # 80 each in the long run, standard deviation 7.
    assert 45 < begins < 115 and 45 < ends < 115
    plain = Denoising((Denoiser("span", rate=0.4),), FRAMES["decoder"]).batch(
        pieces, [[0]] * 200, range(200), [0] * 200
    )
    inputs = [parts(plain, row, 0)[0] for row in range(200)]
    assert not any(tokens[1] in SENTINELS for tokens in inputs) and all(tokens[-1] in SENTINELS for tokens in inputs)


def test_prefixes_that_share_an_encoder_fit_and_stay_uniform():
    denoising = Denoising(PREFIX, Frame("encoder-decoder", 512, 512, SPECIALS))
    cut = int(denoising.cuts[0])
    assert cut == 511
    full = np.arange(TEXT, TEXT + cut + 1)
    batch = denoising.batch([[full, full]] * 800, [[0, 0]] * 800, range(800), [0] * 800)
    # Two pieces fill both sides of their row, whatever the first one's split.
    assert (batch.documents >= 0).mean() > 0.998 and (batch.encoded.documents >= 0).mean() > 0.998
    for piece in (0, 1):
        lengths = (batch.encoded.documents == piece).sum(axis=1)
        # 100 in each eighth, standard deviation 9.4.
        assert all(abs(count - 100) < 48 for count in np.histogram(lengths, 8, (0.5, 511.5))[0])


def test_units_fit_in_any_company():
    rng = np.random.default_rng(0)
    for encoder_context, context in ((96, 96), (192, 96), (96, 192), (640, 40)):
        denoising = Denoising((*UL2R, Denoiser("prefix")), Frame("encoder-decoder", context, encoder_context, SPECIALS))
        tasks = rng.integers(len(denoising.denoisers), size=3000)
        pairs = 1 + (rng.random(3000) * denoising.cuts[tasks]).astype(int)
        order, counts, places = denoising.units(tasks, pairs, np.zeros(3000, bool))
        assert sorted(order.tolist()) == list(range(3000)) and set(counts.tolist()) == {1, 2}
        units = np.split(order, np.cumsum(counts)[:-1])
        rows, room = [[]], denoising.frame.capacity
        for unit in rng.permutation(len(units)):
            if places[unit] > room:
                rows.append([])
                room = denoising.frame.capacity
            rows[-1] += units[unit].tolist()
            room -= int(places[unit])
        texts = [[np.arange(TEXT, TEXT + pairs[piece] + 1) for piece in row] for row in rows]
        for seed in range(3):
            keys = range(seed * len(rows), (seed + 1) * len(rows))
            # It raises ValueError where a row overflows.
            batch = denoising.batch(texts, [tasks[row] for row in rows], keys, [0] * len(rows))
            assert [row.max() + 1 for row in batch.documents] == [len(row) for row in rows]


@pytest.mark.parametrize("pooling", [1, 2, 4, 8])
def test_the_shortest_encoder_that_a_recipe_may_have_holds_a_couple(pooling):
    encoder_context = SHORTEST_CONTEXT + 2 * (pooling - 1)
    for mixture in (UL2, PREFIX):
        denoising = Denoising(mixture, Frame("encoder-decoder", SHORTEST_CONTEXT, encoder_context, SPECIALS, pooling))
        assert denoising.cuts.min() >= 1


def test_where_an_encoder_pools_documents_begin_at_multiples():
    denoising = Denoising(UL2, FRAMES["pooled"])
    pieces, tasks = drawn_rows(denoising, np.random.default_rng(0), rows=8)
    batch = denoising.batch(pieces, tasks, range(len(pieces)), [7] * len(pieces))
    documents = batch.encoded.documents
    begins = (documents >= 0) & (batch.encoded.positions == 0)
    assert begins.sum() > len(documents)
    assert (np.nonzero(begins)[1] % 4 == 0).all()


def test_all_depends_on_the_key_of_its_row_alone():
    for topology, frame in FRAMES.items():
        denoising = Denoising(UL2R, frame)
        pieces, tasks = drawn_rows(denoising, np.random.default_rng(5))

        def made(order, keys, denoising=denoising, pieces=pieces, tasks=tasks):
            batch = denoising.batch([pieces[n] for n in order], [tasks[n] for n in order], keys, [0] * len(order))
            return [row.tolist() for row in batch.inputs], [row.tolist() for row in batch.targets]

        whole = made([0, 1, 2, 3], [9, 8, 7, 6])
        assert made([2, 0], [7, 9]) == tuple([part[2], part[0]] for part in whole), topology
        other = made([0, 1, 2, 3], [9, 8, 7, 5])
        assert other[0][:3] == whole[0][:3] and other[0][3] != whole[0][3]


def test_seqios_packed_prefix_example():
    """PrefixLMFeatureConverter's docstring: begin is a 0 before each example's inputs, the causal attention is region
    1."""
    examples = Examples(
        inputs=np.array([0, 7, 8, 5, 1, 0, 8, 4, 9, 3, 1], np.int32),
        input_lengths=np.array([5, 6]),
        targets=np.array([3, 9, 1, 4, 1], np.int32),
        target_lengths=np.array([3, 2]),
        weights=np.ones(5, np.float32),
        two_way=np.ones(2, bool),
    )
    batch = lay_out(examples, [2], [0], Frame("prefix", 15, 0, Specials(0, 1, 0, (), {})))
    assert batch.targets.tolist() == [[7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0]]
    assert batch.inputs.tolist() == [[0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0]]
    assert batch.loss_weights.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]]
    assert batch.regions.tolist() == [[1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]]
    with pytest.raises(ValueError, match="overflow a row of 13"):
        lay_out(examples, [2], [0], Frame("prefix", 13, 0, Specials(0, 1, 0, (), {})))


def test_an_encoder_reads_the_inputs_and_the_decoder_the_targets_after_begin():
    denoising = Denoising(
        (Denoiser("span", rate=0.5, mean_span=2, mode="X"),), Frame("encoder-decoder", 9, 8, SPECIALS)
    )
    text = [np.array([BEGIN, 1001, 1002, 1003, 1004, END])]
    batch = denoising.batch([text, []], [[0], []], [0, 0], [3, 3])
    assert batch.encoded.inputs.tolist() == [[MODES["X"], BEGIN, 1001, 1002, SENTINELS[0], PAD, PAD, PAD], [PAD] * 8]
    assert batch.encoded.documents.tolist() == [[0] * 5 + [-1] * 3, [-1] * 8]
    assert batch.encoded.positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [0] * 8]
    assert batch.targets.tolist() == [[SENTINELS[0], 1003, 1004, END, *[PAD] * 5], [PAD] * 9]
    assert batch.inputs.tolist() == [[BEGIN, SENTINELS[0], 1003, 1004, *[PAD] * 5], [PAD] * 9]
    assert batch.loss_weights.tolist() == [[1] * 4 + [0] * 5, [0] * 9]
    assert not batch.regions.any() and batch.sources.tolist() == [3, 3]


def test_pieces_are_shared_out_by_weight_and_come_to_others_in_the_next_pass():
    mixture = (Denoiser("span", weight=1), Denoiser("prefix", weight=2), Denoiser("causal", weight=1))
    denoising = Denoising(mixture, FRAMES["decoder"])
    documents, ordinals = np.repeat(np.arange(2000), 5), np.tile(np.arange(5), 2000)
    tasks = np.stack([denoising.choose(documents, ordinals, variant) for variant in range(3)])
    shares = np.bincount(tasks[0], minlength=3) / len(documents)
    # Standard deviation of a share of 10,000: 0.005.
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    # Three passes are a third of the circle apart: no piece has the same quarter of it twice.
    assert ((tasks == 0).sum(axis=0) <= 1).all() and ((tasks == 2).sum(axis=0) <= 1).all()
    assert (tasks[0] != tasks[1]).mean() > 0.5
