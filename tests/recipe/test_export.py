"""Which Hugging Face class a recipe fits is known before it is trained, and so is what would make it fit."""

import dataclasses
import random

import pytest

from calledshot.recipe import Recipe, UsageError, load_recipe, presets, schema
from calledshot.recipe.check import problems
from calledshot.recipe.export import CLASSES, MOST_CHANGES, export_kind, obstacles

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


CHOICES = {
    "positions": ("t5", "none"), "norm": ("layernorm",), "norm_placement": ("post", "sandwich"), "softcap": (10,),
    "feed_forward": ("geglu", "gelu", "relu2"), "qk_norm": ("false",), "hidden": (24,), "head_width": (7, 8),
}  # fmt: skip
OF_ENCODERS = {
    "encoder_pooling": (2,), "encoder_layers": (2, 4), "encoder_hidden": (16, 24), "encoder_width": (24, 48),
    "encoder_context": (16,),
}  # fmt: skip
OF_EXPERTS = {
    "top_k": (1, 2), "renormalize": ("false",), "router": ("sigmoid",), "balance": ("bias", "none"),
    "shared_expert_hidden": (8,), "expert_hidden": (16,), "dense_layers": (1,),
}  # fmt: skip
SCALED = ("model.rope_scaling=yarn", "model.rope_factor=2", "model.rope_original_context=16")
SHARED = ("parallel.tensor=2", "parallel.context=2", "parallel.expert=2", "parallel.micro_tokens=96")
MIXED = 'objective.denoisers=[{kind="causal"},{kind="span"}]'


def odd_recipe(seed: int) -> list[str]:
    """Overrides of the demo; where they do not fit together, it is refused."""
    draw = random.Random(seed)
    topology, experts = draw.choice(("decoder", "prefix", "encoder-decoder")), draw.choice((0, 2, 8))
    heads = draw.choice((1, 2, 3, 4, 6))
    keys = {"topology": topology, "experts": experts, "heads": heads, "kv_heads": draw.choice((1, heads))}
    keys |= {"layers": 2, "context": 48, "width": draw.choice((heads * 8, heads * 5, 20))}
    choices = CHOICES | (OF_ENCODERS if topology == "encoder-decoder" else {}) | (OF_EXPERTS if experts else {})
    keys |= {key: draw.choice(values) for key, values in choices.items() if draw.random() < 0.25}
    kind = draw.choice(("causal", "span", "ul2", "mixture"))
    overrides = [f"model.{key}={value}" for key, value in keys.items()]
    overrides += [f"objective.kind={kind}", *([MIXED] if kind == "mixture" else [])]
    overrides += [*(SCALED if draw.random() < 0.2 else ()), *(one for one in SHARED if draw.random() < 0.15)]
    row = 48 + (keys.get("encoder_context", 48) if topology == "encoder-decoder" else 0)
    return [*overrides, f"batch.tokens={draw.choice((3, 4)) * row}"]


def told(overrides: list[str], asked: str) -> str:
    """What is said of the demo with these overrides, of which the class is `asked`; nothing where it fits."""
    try:
        recipe = load_recipe("demo", [*overrides, f"model.exportable_to={asked}"])
        return export_kind(recipe.model, recipe) and ""
    except UsageError as error:
        return str(error)


def test_whatever_is_named_as_the_nearest_recipe_passes_and_fits_and_none_of_it_is_idle():
    named = 0
    for seed in range(700):
        overrides, asked = odd_recipe(seed), ("", *CLASSES)[seed % 6]
        try:
            load_recipe("demo", overrides)
        except UsageError:
            continue
        _, fits, changes = told(overrides, asked).partition(" fits with ")
        if fits:
            named += 1
            assert len(changes.split()) <= MOST_CHANGES
            assert not told([*overrides, *changes.split()], asked), (overrides, asked, changes)
            for idle in changes.split():
                assert told([*overrides, *(one for one in changes.split() if one != idle)], asked), (overrides, idle)
    assert named > 150


ROUTED = ["model.experts=8", "model.top_k=1", "model.renormalize=false"]
ENCODING = ["model.topology=encoder-decoder", "objective.kind=span"]


@pytest.mark.parametrize(
    ("overrides", "asked", "words"),
    [
        ([*ROUTED, "model.qk_norm=false"], "", "Qwen3MoeForCausalLM fits with model.qk_norm=true"),
        (ROUTED, "qwen3", "model.experts=0 model.top_k=2 model.renormalize=true"),
        (["model.experts=8", "model.balance=bias"], "llama", "model.experts=0 model.balance=auxiliary"),
        ([*ENCODING, "model.encoder_layers=2"], "qwen3", "model.topology=decoder model.encoder_layers=0"),
        (["model.width=20", "model.heads=4", "model.positions=none"], "", "model.positions=rope model.head_width=6"),
        (
            [*ENCODING, *SCALED, "model.qk_norm=false", "model.kv_heads=4"],
            "t5",
            "model.positions=t5 model.rope_scaling=none model.rope_factor=1 model.rope_original_context=0",
        ),
        (
            ["model.width=64", "model.heads=4", "model.kv_heads=4", "model.qk_norm=false", "batch.tokens=1792"],
            "t5",
            "model.topology=encoder-decoder model.positions=t5 objective.kind=span batch.tokens=2048",
        ),
        (["model.width=100", "model.head_width=16", "model.heads=6", "model.kv_heads=3"], "llama", "model.kv_heads=5"),
    ],
)
def test_a_change_that_asks_for_others_brings_them(overrides, asked, words):
    said = told(overrides, asked)
    assert said.endswith(words)
    assert not told([*overrides, *said.partition(" fits with ")[2].split()], asked)


def test_a_class_that_is_too_far_away_is_no_suggestion():
    far = ["model.norm=layernorm", "model.softcap=30", *ROUTED, "model.dense_layers=1", "model.router=sigmoid"]
    assert told(far, "t5").endswith("No change of 8 keys or fewer makes it a T5ForConditionalGeneration")


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
