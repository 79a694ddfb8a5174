"""Suffixes: the same bytes for models of every topology and objective."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calledshot.evals import evaluate
from calledshot.recipe import UsageError
from calledshot.training import load_model

MODELS = (
    ("decoder", "causal"),
    ("decoder", "ul2"),
    ("prefix", "prefix"),
    ("encoder-decoder", "span"),
    ("encoder-decoder", "ul2"),
)


@pytest.fixture(scope="module")
def runs(make_run, random_weights):
    return {pair: make_run(f"{pair[0]}-{pair[1]}", random_weights, *pair) for pair in MODELS}


def test_every_model_is_asked_for_the_same_bytes(runs):
    found = [evaluate(run, predict="suffixes").scored for run in runs.values()]
    for scored in found[1:]:
        for source in found[0]:
            assert scored[source].names == found[0][source].names
            assert np.array_equal(scored[source].bytes, found[0][source].bytes)


def test_a_suffix_costs_a_decoder_what_it_costs_after_its_prefix(runs):
    """Of a document that is one piece: plain cross-entropy of its last tokens."""
    run = runs["decoder", "causal"]
    loaded = load_model(run)
    suffixes, whole = (evaluate(run, predict=predict).scored["prose"] for predict in ("suffixes", "whole"))
    lines = map(json.loads, (run.path.parent.parent / "prose.jsonl").read_text().splitlines())
    texts = {line["id"]: line["text"] for line in lines}
    checked = 0
    for number, name in enumerate(suffixes.names):
        text = texts[name]
        ids = [loaded.tokenizer.begin, *loaded.tokenizer.encode(text), loaded.tokenizer.end]
        if len(ids) - 1 > 44:
            continue
        tokens = torch.tensor([ids])
        logits = loaded.model.logits(loaded.model.hidden_states(tokens[:, :-1]))[0]
        nats = F.cross_entropy(logits.double(), tokens[0, 1:], reduction="none")
        predicted = int(suffixes.tokens[number])
        assert 0 < predicted < whole.tokens[number]
        assert suffixes.nats[number] == pytest.approx(float(nats[-predicted:].sum()), rel=1e-5)
        assert suffixes.bytes[number] == len(loaded.tokenizer.decode_bytes(ids[-predicted:-1]))
        checked += 1
    assert checked


def test_an_encoder_decoder_is_asked_for_suffixes(runs):
    run = runs["encoder-decoder", "ul2"]
    auto, suffixes = (evaluate(run, predict=predict).scored["prose"] for predict in ("auto", "suffixes"))
    assert np.array_equal(auto.nats, suffixes.nats)
    assert evaluate(run).kind == "held-out-suffixes" and evaluate(runs["decoder", "causal"]).kind == "held-out"
    with pytest.raises(UsageError, match="take --predict suffixes"):
        evaluate(run, predict="whole")
