"""Which Hugging Face class a recipe fits is known before it is trained, and so is what would make it fit."""

import dataclasses

import pytest

from calledshot.recipe import Recipe, UsageError, load_recipe, presets, schema
from calledshot.recipe.check import problems
from calledshot.recipe.export import CLASSES, export_kind, obstacles

FITTING = {
    "qwen3": schema.Model(),
    "llama": schema.Model(qk_norm=False),
    "qwen3-moe": schema.Model(experts=8, renormalize=False, dense_layers=1),
    "mixtral": schema.Model(experts=8, qk_norm=False),
    "t5": schema.Model(topology="encoder-decoder", positions="t5", qk_norm=False, feed_forward="geglu", kv_heads=6),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_holds_what_is_made_for_it_and_no_other_does(kind):
    model = FITTING[kind]
    assert export_kind(model) == kind
    for other in CLASSES:
        assert bool(obstacles(model, other)) is (other != kind)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("start", CLASSES)
def test_the_changes_that_are_named_make_it_fit(start, kind):
    """Whatever else is odd about it too."""
    odd = dataclasses.replace(
        FITTING[start], norm="layernorm", norm_placement="sandwich", softcap=30.0, width=400, head_width=64, heads=6,
        kv_heads=3, shared_expert_hidden=64 if FITTING[start].experts else 0, router="sigmoid", balance="bias",
    )  # fmt: skip
    overrides = [change for one in obstacles(odd, kind) for change in one.change.split()]
    values = {key.removeprefix("model."): value for key, _, value in (one.partition("=") for one in overrides)}
    kinds = {field: type(getattr(odd, field)) for field in values}
    read = {
        key: value == "true" if kinds[key] is bool else kinds[key](float(value) if kinds[key] is not str else value)
        for key, value in values.items()
    }
    assert not obstacles(dataclasses.replace(odd, **read), kind)


@pytest.mark.parametrize("name", [preset.name for preset in presets()])
def test_presets_of_decoders_have_a_class(name):
    model = load_recipe(name).model
    if model.topology == "decoder":
        assert export_kind(model) in CLASSES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"softcap": 30.0}, "model.softcap = 30, but it does not cap logits. Qwen3ForCausalLM fits"),
        ({"softcap": 30.0}, "with model.softcap=0"),
        ({"norm_placement": "post", "qk_norm": False}, "LlamaForCausalLM fits with model.norm_placement=pre"),
        ({"experts": 8, "balance": "bias"}, "Qwen3MoeForCausalLM fits with model.balance=auxiliary"),
        ({"experts": 8, "qk_norm": False, "renormalize": False, "dense_layers": 1}, "fits with model.qk_norm=true"),
        ({"topology": "encoder-decoder", "positions": "t5"}, "model.kv_heads=6"),
    ],
)
def test_the_nearest_is_named(change, words):
    with pytest.raises(UsageError, match="no Hugging Face class computes this model") as raised:
        export_kind(schema.Model(**change))
    assert words in str(raised.value)


def test_a_demand_is_checked_with_the_recipe():
    def found(**keys: object) -> list[str]:
        model = schema.Model(**keys)
        return list(problems(Recipe(model=model, duration=schema.Duration(tokens=8192))))

    assert not found(exportable_to="qwen3") and not found(exportable_to="llama", qk_norm=False)
    (problem,) = found(exportable_to="mixtral")
    assert problem.startswith("model.exportable_to = mixtral: model.qk_norm = true, but it does not normalize")
    assert problem.endswith("MixtralForCausalLM fits with model.qk_norm=false model.experts=8")
    assert found(exportable_to="gpt2") == [
        "model.exportable_to = 'gpt2': choose llama or qwen3 or qwen3-moe or mixtral or t5, or leave it empty for none"
    ]
