"""Scores of whole documents against each document read alone by plain PyTorch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calledshot.data import HeldOut, Tokenizer
from calledshot.evals import Scored, compare, evaluate, prepared_data, score_prepared, score_texts
from calledshot.evals.scoring import read_texts
from calledshot.recipe import RunError, UsageError
from calledshot.training import Loaded, load_model


def texts_of(prepared, source: str) -> dict[str, tuple[str, str]]:
    """Name to (text, language) of the held-out documents, straight from the shards."""
    found = {}
    for shard in prepared.source(source).held_out.shards:
        index = shard.index(prepared.path)
        ids = np.fromfile(prepared.path / f"{shard.stem}.bin", prepared.dtype)
        for name, stop, entry in zip(shard.names(prepared.path), np.cumsum(index["ids"]), index, strict=True):
            text = prepared.tokenizer.decode(ids[stop - entry["ids"] + 1 : stop - 1])
            found[name] = text, shard.languages[entry["language"]]
    return found


def alone(loaded: Loaded, text: str) -> float:
    """Nats of a document cut into rows of the context, without packing, masks or chunks."""
    tokenizer, context = loaded.tokenizer, loaded.recipe.model.context
    ids = torch.tensor([tokenizer.begin, *tokenizer.encode(text), tokenizer.end])
    nats = 0.0
    for start in range(0, len(ids) - 1, context):
        piece = ids[start : start + context + 1]
        logits = loaded.model.logits(loaded.model.hidden_states(piece[None, :-1]))[0]
        nats += F.cross_entropy(logits.double(), piece[1:], reduction="sum").item()
    return nats


@pytest.fixture(scope="module")
def loaded(random_run) -> Loaded:
    return load_model(random_run)


@pytest.fixture(scope="module")
def prepared(random_run):
    return prepared_data(random_run)


def test_each_document_costs_what_it_costs_alone(loaded, prepared):
    scored = score_prepared(loaded, prepared)
    assert list(scored) == ["prose", "notes"]
    for source, one in scored.items():
        texts = texts_of(prepared, source)
        assert set(one.names) == set(texts)
        for name, language, nats, size in zip(one.names, one.languages, one.nats, one.bytes, strict=True):
            text, expected = texts[name]
            assert (language, size) == (expected, len(text.encode()))
            assert nats == pytest.approx(alone(loaded, text), rel=1e-5)


def test_measures_are_sums_over_sums_and_languages_add_up(loaded, prepared):
    one = score_prepared(loaded, prepared, sources=["prose"])["prose"]
    whole, languages = one.measure(), one.by_language()
    assert whole.loss.value == pytest.approx(one.nats.sum() / one.tokens.sum())
    assert whole.bits_per_byte.value == pytest.approx(one.nats.sum() / math.log(2) / one.bytes.sum())
    assert whole.perplexity == pytest.approx(math.exp(whole.loss.value))
    assert whole.bytes_per_token == pytest.approx(one.bytes.sum() / one.tokens.sum())
    assert whole.bits_per_byte.low < whole.bits_per_byte.value < whole.bits_per_byte.high
    assert set(languages) == {"de", "en"}
    for count in ("documents", "tokens", "bytes"):
        assert sum(getattr(each, count) for each in languages.values()) == getattr(whole, count)


def test_a_uniform_model_pays_the_logarithm_of_its_vocabulary(uniform_run):
    evaluation = evaluate(uniform_run)
    for one in evaluation.scored.values():
        measure = one.measure()
        assert measure.loss.value == pytest.approx(math.log(576), rel=1e-6)
        assert measure.bits_per_byte.value == pytest.approx(measure.tokens * math.log2(576) / measure.bytes, rel=1e-6)


def test_text_costs_what_the_same_held_out_documents_cost(loaded, prepared):
    """Packed in another order, by another way in."""
    one = score_prepared(loaded, prepared, sources=["notes"])["notes"]
    texts = {name: text for name, (text, _) in texts_of(prepared, "notes").items()}
    again = score_texts(loaded, dict(reversed(texts.items())))
    costs = dict(zip(again.names, again.nats, strict=True))
    assert [costs[name] for name in one.names] == pytest.approx(one.nats.tolist(), rel=1e-5)


def test_fewer_tokens_are_fewer_whole_documents(loaded, prepared):
    some = score_prepared(loaded, prepared, sources=["prose"], tokens=300)["prose"]
    every = score_prepared(loaded, prepared, sources=["prose"])["prose"]
    costs = dict(zip(every.names, every.nats, strict=True))
    assert 300 <= some.tokens.sum() < every.tokens.sum()
    assert [costs[name] for name in some.names] == pytest.approx(some.nats.tolist(), rel=1e-5)


def test_the_training_split_is_the_other_documents(loaded, prepared):
    train = score_prepared(loaded, prepared, sources=["prose"], split="train")["prose"]
    held_out = score_prepared(loaded, prepared, sources=["prose"])["prose"]
    assert {f"d{n}" for n in range(120)} == {*train.names, *held_out.names}
    assert not {*train.names} & {*held_out.names}


def test_rows_no_longer_than_their_documents_change_no_number(loaded, prepared, monkeypatch):
    whole = {predict: score_prepared(loaded, prepared, predict=predict) for predict in ("whole", "suffixes")}
    monkeypatch.setattr("calledshot.evals.scoring.ROW", 16)
    for predict, expected in whole.items():
        for source, scored in score_prepared(loaded, prepared, predict=predict).items():
            assert scored.nats == pytest.approx(expected[source].nats, rel=1e-5)
            assert np.array_equal(scored.bytes, expected[source].bytes)


def test_scores_are_those_of_the_training_loop(loaded, prepared):
    """`training.evaluation` measures the same documents inside the loop."""
    from calledshot.training.engine import Engine
    from calledshot.training.evaluation import evaluate as in_loop
    from calledshot.training.probe import Machine
    from calledshot.training.stop import Stop
    from calledshot.training.world import World

    machine = Machine("cpu", "float32", compile=False, threads=1, micro_tokens=48)
    engine = Engine(loaded.recipe, machine, World.join(), prepared.tokenizer, loaded.run.path)
    engine.model.load_state_dict(loaded.model.state_dict())
    rows = in_loop(engine, HeldOut(prepared, loaded.recipe), 0, Stop())
    scored = score_prepared(loaded, prepared)
    for row in rows:
        measure = scored[row["source"]].measure()
        assert row["loss"] == pytest.approx(measure.loss.value, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(measure.bits_per_byte.value, rel=1e-5)


def test_runs_are_compared_document_by_document(random_run, uniform_run):
    random, uniform = (evaluate(run).scored for run in (random_run, uniform_run))
    found = compare(uniform["prose"], random["prose"])
    expected = uniform["prose"].measure().bits_per_byte.value - random["prose"].measure().bits_per_byte.value
    assert found.difference.value == pytest.approx(expected, rel=1e-6)
    # Random weights are worse than none on every document, which an unpaired comparison would see less clearly.
    assert found.difference.high < 0
    assert found.p_value < 0.01
    assert compare(random["prose"], random["notes"]) is None


@pytest.mark.parametrize(
    "content, reason", [(None, "cannot be read"), (b"", "is empty"), (b"\x7fELF\xff\xfe", "is not UTF-8 text")]
)
def test_files_that_are_no_text_are_named(content, reason, tmp_path):
    file = tmp_path / "some.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"some\.txt: {reason}"):
        read_texts([file])


def test_data_of_another_tokenizer_are_refused(make_run):
    run = make_run("moved", lambda decoder: decoder.initialise(torch.Generator()))
    Tokenizer.train(["quite another corpus, of zebras and quilts"] * 9, 576).save(run.path / "tokenizer.json")
    with pytest.raises(RunError, match="the sources have changed"):
        prepared_data(run)


def test_weights_that_are_not_finite_are_told(make_run):
    run = make_run("broken", lambda decoder: [p.data.fill_(math.nan) for p in decoder.parameters()])
    with pytest.raises(RunError, match="the loss is not finite"):
        evaluate(run)


def test_bits_per_byte_are_not_known_where_the_tokenizer_loses_text():
    sizes = np.array([10, 20])
    kept = Scored("s", ("a", "b"), ("und", "und"), np.array([5.0, 9.0]), np.array([4, 8]), sizes)
    lost = replace(kept, lossless=False)
    assert math.isfinite(kept.measure().bits_per_byte.value) and math.isnan(lost.measure().bits_per_byte.value)
    assert lost.measure().record()["bits_per_byte"] is None
    assert lost.measure().loss == kept.measure().loss
    assert compare(kept, kept) is not None and compare(kept, lost) is None
