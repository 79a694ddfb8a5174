from dataclasses import replace

import pytest

from calledshot.recipe import Recipe, problems
from calledshot.recipe.objectives import denoisers, described
from calledshot.recipe.schema import Batch, Denoiser, Duration, Objective


def recipe(topology="decoder", context=512, **objective):
    plain = Recipe(duration=Duration(tokens=10**6))
    encoder = {"encoder_context": 0}
    return replace(
        plain,
        model=replace(plain.model, topology=topology, context=context, **encoder),
        objective=Objective(**objective),
        batch=Batch(tokens=8 * context * (2 if topology == "encoder-decoder" else 1)),
    )


def test_ul2_has_the_seven_denoisers_of_its_table_and_ul2r_its_four():
    seven = denoisers(Objective(kind="ul2"))
    assert [described(one) for one in seven] == [
        *("span 15% by 3 R", "span 15% by 8 R", "prefix 25% S", "span 50% by 3 X", "span 50% by 8 X"),
        *("span 15% by 64 X", "span 50% by 64 X"),
    ]
    assert {one.weight for one in seven} == {1.0} and not any(one.roll for one in seven)
    four = denoisers(Objective(kind="ul2r"))
    assert [(described(one), one.weight) for one in four] == [
        *(("span 15% by 3 R", 0.25), ("span 15% by 32 X", 0.125), ("span 50% by 3 X", 0.125), ("prefix 25% S", 0.5)),
    ]
    assert [one.roll for one in four] == [True, True, True, False]
    assert not any(one.mode for one in denoisers(Objective(kind="ul2", mode_tokens=False)))


def test_span_takes_its_numbers_from_the_recipe_and_a_mixture_leaves_out_what_has_no_weight():
    assert denoisers(Objective(kind="span", rate=0.3, mean_span=5)) == (Denoiser("span", rate=0.3, mean_span=5),)
    mixed = (Denoiser("causal", weight=0), Denoiser("span", weight=2))
    assert denoisers(Objective(kind="mixture", denoisers=mixed)) == mixed[1:]


@pytest.mark.parametrize("topology", ["decoder", "prefix", "encoder-decoder"])
@pytest.mark.parametrize("kind", ["prefix", "span", "ul2", "ul2r"])
def test_every_topology_takes_every_objective_with_inputs(topology, kind):
    assert not list(problems(recipe(topology, kind=kind)))


def test_rows_count_both_sides():
    asked = recipe("encoder-decoder", kind="span")
    uneven = replace(asked, model=replace(asked.model, encoder_context=2048, context=512), batch=Batch(tokens=8192))
    assert "batch.tokens = 8192 is not a multiple of model.encoder_context + model.context = 2560: take 7680" in list(
        problems(uneven)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topology": "encoder-decoder"}, "objective.kind = 'causal' has causal text, which gives an encoder nothing"),
        (
            {"topology": "encoder-decoder", "kind": "mixture", "denoisers": (Denoiser("causal"), Denoiser("span"))},
            "objective.kind = 'mixture' has causal text",
        ),
        ({"kind": "mixture"}, "give at least one, of a weight above 0"),
        ({"kind": "mixture", "denoisers": (Denoiser(weight=0),)}, "give at least one, of a weight above 0"),
        ({"kind": "mixture", "denoisers": (Denoiser(weight=-1), Denoiser())}, "denoisers.0.weight = -1"),
        ({"kind": "mixture", "denoisers": (Denoiser(weight=-1),)}, "denoisers.0.weight = -1"),
        ({"kind": "causal", "rate": 0.3}, "objective.rate = 0.3 is for objective.kind = span, and that is 'causal'"),
        ({"kind": "ul2", "mean_span": 8.0}, "leave objective.mean_span out"),
        ({"kind": "span", "mode_tokens": False}, "mode_tokens = False is for objective.kind = ul2 or ul2r"),
        ({"kind": "mixture", "denoisers": (Denoiser(weight=float("nan")), Denoiser())}, "denoisers.0.weight = nan"),
        ({"kind": "mixture", "denoisers": (Denoiser("spam"),)}, "denoisers.0.kind = 'spam': choose span or prefix"),
        ({"kind": "mixture", "denoisers": (Denoiser("span", mode="Q"),)}, "denoisers.0.mode = 'Q': choose R or S or X"),
        ({"kind": "mixture", "denoisers": (Denoiser("prefix", rate=0.6),)}, "denoisers.0.rate = 0.6 must be more"),
        ({"kind": "mixture", "denoisers": (Denoiser(rate=1.0),)}, "denoisers.0.rate = 1.0 is a share"),
        ({"kind": "span", "rate": 0.0}, "objective.rate = 0.0 is a share of the tokens"),
        ({"kind": "span", "mean_span": 0.5}, "objective.mean_span = 0.5 must be at least 1 token"),
        ({"kind": "ul2", "denoisers": (Denoiser(),)}, 'belong to objective.kind = "mixture"'),
        ({"kind": "span", "context": 4}, "a context of 4 is too short for span: take 8 or more"),
        ({"kind": "ul3"}, "objective.kind = 'ul3': choose causal or prefix or span or ul2 or ul2r or mixture"),
    ],
)
def test_impossible_objectives_get_one_line(options, said):
    (line,) = problems(recipe(**options))
    assert said in line and "\n" not in line
