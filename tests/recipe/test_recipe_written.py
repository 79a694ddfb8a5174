"""A recipe as text, as data and as a hash, and what differs between two."""

import json
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.recipe import (
    IDENTITY_EXCLUDES,
    UsageError,
    difference,
    documented,
    from_dict,
    identity,
    load_recipe,
    optimizer_groups,
    presets,
    source_name,
    to_dict,
    to_toml,
)
from calledshot.recipe.schema import Data, Evals, Phase, Source

KEYS = """
name seed
data.sources.N.path data.sources.N.name data.sources.N.format data.sources.N.weight data.sources.N.max_epochs
data.sources.N.text_field data.sources.N.id_field data.sources.N.language_field data.sources.N.language
data.sources.N.modality data.sources.N.exclude data.phases.N.start data.phases.N.weights data.tokenizer data.held_out
data.skip
model.layers model.width model.heads model.kv_heads model.head_width model.hidden model.vocabulary model.context
model.tied_embeddings model.qk_norm model.rope_base model.softcap model.norm_epsilon
model.topology model.encoder_layers model.encoder_width model.encoder_hidden model.encoder_context
model.encoder_pooling model.positions model.rope_scaling model.rope_factor model.rope_original_context
model.norm model.norm_placement model.feed_forward
model.experts model.top_k model.expert_hidden model.shared_expert_hidden model.dense_layers model.router
model.renormalize model.balance model.balance_weight model.router_z_loss model.exportable_to
objective.kind objective.rate objective.mean_span objective.mode_tokens objective.z_loss
objective.denoisers.N.kind objective.denoisers.N.weight objective.denoisers.N.rate objective.denoisers.N.mean_span
objective.denoisers.N.roll objective.denoisers.N.mode
optimizer.name optimizer.learning_rate optimizer.embedding_learning_rate optimizer.head_learning_rate
optimizer.vector_learning_rate optimizer.weight_decay optimizer.momentum optimizer.beta1 optimizer.beta2
optimizer.epsilon optimizer.clip optimizer.transfer optimizer.base_width
schedule.kind schedule.warmup schedule.decay schedule.final
batch.tokens batch.ramp.N.tokens batch.ramp.N.until
duration.tokens duration.flops duration.minutes
parallel.micro_tokens parallel.dtype parallel.compile parallel.threads
parallel.replicate parallel.shard parallel.tensor parallel.context parallel.expert
parallel.activation_checkpointing parallel.float8
checkpoint.every_steps checkpoint.every_minutes checkpoint.keep checkpoint.keep_every_steps checkpoint.keep_best
checkpoint.keep_bytes checkpoint.asynchronous checkpoint.remote
evals.every_steps evals.tokens evals.final_tokens evals.prompts evals.sample_tokens
evals.norms_every_steps
"""


def test_the_recipe_has_these_keys_and_each_is_documented():
    """The public surface: adding a key is a decision, so this list is edited by hand."""
    found = documented()
    assert {key.name for key in found} == set(KEYS.split())
    assert all(len(key.doc) > 5 for key in found)


@pytest.mark.parametrize("name", [preset.name for preset in presets()])
def test_presets_survive_toml_and_json(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert to_toml(load_recipe(str(path))) == to_toml(recipe)


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(text, max_size=3).map(tuple),
    path=text,
    weight=st.floats(1e-30, 1e30),
    names=st.lists(text, min_size=2, max_size=2, unique=True),
    rate=st.floats(1e-30, 1e30),
)
def test_any_text_and_any_number_survive_toml(prompts, path, weight, names, rate):
    recipe = load_recipe("demo")
    sources = tuple(Source(path=path, name=name, weight=weight) for name in names)
    recipe = replace(
        recipe,
        data=Data(sources=sources, phases=(Phase(0.5, {names[0]: weight}),), skip=(1, 2**40)),
        evals=Evals(prompts=prompts),
        optimizer=replace(recipe.optimizer, learning_rate=rate),
    )
    assert from_dict(tomllib.loads(to_toml(recipe))) == recipe


def test_an_old_recipe_without_a_newer_key_reads_with_its_default():
    data = to_dict(load_recipe("demo"))
    del data["model"]["softcap"]
    assert from_dict(data) == load_recipe("demo")
    data["model"]["newer"] = 1
    with pytest.raises(UsageError, match=r"runs/x/recipe\.toml: unknown key model\.newer"):
        from_dict(data, "runs/x/recipe.toml")


def test_identity_is_what_decides_the_run_and_nothing_else():
    base = load_recipe("demo")
    assert len(identity(base)) == 64
    changeable = ["name=x", "parallel.dtype=float32", "checkpoint.keep=9", "evals.tokens=1k", "data.skip=[3]"]
    for override in changeable:
        assert identity(load_recipe("demo", [override])) == identity(base), override
    assert {override.split("=")[0].split(".")[0] for override in changeable} == {
        key.split(".")[0] for key in IDENTITY_EXCLUDES
    }
    decisive = ["seed=1", "model.layers=7", "data.sources.0.weight=2", "duration.minutes=11", "optimizer.clip=2"]
    assert len({identity(load_recipe("demo", [override])) for override in decisive} | {identity(base)}) == 6


def test_identity_does_not_depend_on_how_the_recipe_was_asked_for(tmp_path):
    path = tmp_path / "same.toml"
    path.write_text('extends = "demo"\n[duration]\ntokens = 1e6\n')
    assert identity(load_recipe(str(path))) == identity(load_recipe("demo", ["--duration.tokens", "1M"]))


def test_difference_names_keys_and_both_values():
    a, b = load_recipe("demo"), load_recipe("demo", ["model.layers=8", "name=b", "data.sources.0.weight=2"])
    assert difference(a, b) == [
        ("name", "", "b"),
        ("data.sources.0.weight", 1.0, 2.0),
        ("model.layers", 6, 8),
    ]
    assert [key for key, _, _ in difference(a, b, identity_only=True)] == ["data.sources.0.weight", "model.layers"]
    assert difference(a, a) == []
    assert ("data.sources.1.path", None, "x") in difference(a, load_recipe("demo", ["data.sources.1.path=x"]))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("python", "python"),
        ("hf:HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet", "fineweb-edu"),
        ("hf:OWNER/NAME", "NAME"),
        ("../corpora/text/books.jsonl.xz", "books"),
        ("corpora/books/", "books"),
        ("corpora/**/*.txt", "corpora"),
        ("*.txt", "text"),
        ("/data/v1.2/", "v1"),
        ("~/.notes", ".notes"),
    ],
)
def test_names_that_sources_take_from_their_paths(path, name):
    assert source_name(Source(path=path)) == name
    assert source_name(Source(path=path, name="mine")) == "mine"


def test_learning_rates_move_with_width_where_the_theory_says_so():
    """Yang et al., Tensor Programs V, table 3: Adam's rate for hidden and output matrices falls as 1 / width, that of
    inputs and vectors stays. Muon's orthogonal updates need no such factor for the hidden ones."""

    def rates(width: int, *overrides: str) -> dict[str, float]:
        return optimizer_groups(load_recipe("demo", [f"model.width={width}", "optimizer.base_width=256", *overrides]))

    for name, scaled in (("adamw", {"matrix", "head"}), ("muon", {"head"})):
        narrow, wide = rates(256, f"optimizer.name={name}"), rates(1024, f"optimizer.name={name}")
        for group in narrow:
            assert wide[group] == pytest.approx(narrow[group] / (4 if group in scaled else 1)), (name, group)
    written = ["optimizer.transfer=none", "optimizer.name=adamw", "optimizer.learning_rate=1e-3"]
    assert set(rates(1024, *written).values()) == {1e-3}
    assert rates(256, "optimizer.head_learning_rate=0.5")["head"] == 0.5


def test_an_encoder_of_another_width_has_rates_of_its_own():
    """Fan-in decides (Tensor Programs V): matrices that read the encoder's states go by its width, the decoder's by
    theirs; its own table is an input's, also where the decoder's is the head too."""

    def rates(*overrides: str) -> dict[str, float]:
        asked = ["model.width=256", "model.topology=encoder-decoder", "objective.kind=span", "optimizer.base_width=256"]
        return optimizer_groups(load_recipe("demo", [*asked, *overrides]))

    alike = rates("optimizer.name=adamw")
    assert alike["encoder_matrix"] == alike["matrix"] and "encoder_embedding" not in alike
    assert "encoder_matrix" not in optimizer_groups(load_recipe("demo"))
    narrow = rates("optimizer.name=adamw", "model.encoder_width=128", "model.tied_embeddings=true")
    assert narrow["encoder_matrix"] == pytest.approx(2 * alike["matrix"]) and narrow["matrix"] == alike["matrix"]
    assert narrow["encoder_embedding"] == pytest.approx(alike["embedding"]) and narrow["embedding"] == narrow["head"]
    muon = rates("optimizer.name=muon", "model.encoder_width=128")
    assert muon["encoder_matrix"] == muon["matrix"]
