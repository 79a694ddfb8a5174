"""Presets, files, `extends`, overrides, units, and what is said when they are wrong."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.data.tokenizer import SMALLEST
from calledshot.recipe import UsageError, load_recipe, presets, problems, to_toml
from calledshot.recipe.check import LEAST_VOCABULARY


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def refusal(reference: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(reference, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_presets_of_the_issue_are_there_and_hold_together():
    assert [preset.name for preset in presets()] == ["demo", "10M", "125M", "350M", "1B", "7B", "10B", "20B", "ul2-20B"]
    for preset in presets():
        assert list(problems(load_recipe(preset.name))) == []
        assert preset.summary.endswith(".")


@pytest.mark.parametrize(
    "tokens", [["model.layers=8"], ["--model.layers", "8"], ["--model.layers=8"], ["model.layers=8.0"]]
)
def test_both_styles_of_override(tokens):
    assert load_recipe("demo", tokens).model.layers == 8


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("duration.tokens=3B", "duration", "tokens", 3_000_000_000),
        ("duration.tokens=1.5M", "duration", "tokens", 1_500_000),
        ("duration.tokens=2T", "duration", "tokens", 2 * 10**12),
        ("duration.tokens=1_000_000", "duration", "tokens", 1_000_000),
        ("duration.flops=1e21", "duration", "flops", 1e21),
        ("duration.flops=1e21flop", "duration", "flops", 1e21),
        ("duration.flops=400 PFLOP", "duration", "flops", 4e17),
        ("duration.minutes=2h", "duration", "minutes", 120.0),
        ("duration.minutes=90s", "duration", "minutes", 1.5),
        ("duration.minutes=1d", "duration", "minutes", 1440.0),
        ("duration.minutes=10min", "duration", "minutes", 10.0),
        ("checkpoint.every_minutes=2h", "checkpoint", "every_minutes", 120.0),
        ("checkpoint.keep_bytes=2GiB", "checkpoint", "keep_bytes", 2**31),
        ("checkpoint.keep_bytes=0", "checkpoint", "keep_bytes", 0),
        ("schedule.decay=45%", "schedule", "decay", 0.45),
        ("data.held_out=1%", "data", "held_out", 0.01),
        ("model.vocabulary=8k", "model", "vocabulary", 8000),
        ("model.rope_base=500k", "model", "rope_base", 500_000.0),
        ("model.tied-embeddings=true", "model", "tied_embeddings", True),
        ("--model.tied_embeddings", "model", "tied_embeddings", True),
        ("data.skip=[3, 5]", "data", "skip", (3, 5)),
        ("data.tokenizer='my tokenizer.json'", "data", "tokenizer", "my tokenizer.json"),
        ("data.tokenizer=8", "data", "tokenizer", "8"),
        ('evals.prompts=["def f(", "a=b"]', "evals", "prompts", ("def f(", "a=b")),
    ],
)
def test_units_and_types_on_the_command_line(override, section, key, value):
    found = getattr(getattr(load_recipe("demo", [override]), section), key)
    assert found == value and type(found) is type(value)


def test_the_same_units_work_in_a_file_in_quotes(tmp_path):
    path = write(tmp_path, "a.toml", '[duration]\ntokens = "3B"\n[schedule]\ndecay = "45%"\n')
    recipe = load_recipe(path)
    assert recipe.duration.tokens == 3 * 10**9 and recipe.schedule.decay == 0.45


def test_sources_are_addressed_by_number_and_one_past_the_end_appends():
    recipe = load_recipe(
        "demo", ["data.sources.0.weight=2", "data.sources.1.path=books/*.txt", "--data.sources.1.max-epochs", "4"]
    )
    assert [(source.path, source.weight, source.max_epochs) for source in recipe.data.sources] == [
        ("python", 2.0, 0.0),
        ("books/*.txt", 1.0, 4.0),
    ]
    inline = load_recipe("demo", ['data.sources=[{path = "a.txt"}, {path = "b.txt", weight = 3}]'])
    assert [source.weight for source in inline.data.sources] == [1.0, 3.0]
    phase = load_recipe("demo", ["data.phases.0.start=50%", "data.phases.0.weights.python=3"]).data.phases[0]
    assert (phase.start, phase.weights) == (0.5, {"python": 3.0})


def test_a_section_as_an_inline_table_is_laid_on_the_section():
    model = load_recipe("demo", ["model={layers = 3, width = 128}"]).model
    assert (model.layers, model.width, model.vocabulary) == (3, 128, load_recipe("demo").model.vocabulary)


def test_extends_lays_one_file_on_another_and_a_file_replaces_the_sources_as_a_whole(tmp_path):
    write(tmp_path, "base.toml", 'extends = "demo"\n[model]\nlayers = 2\nwidth = 128\n[optimizer]\nclip = 0.5\n')
    (tmp_path / "deep").mkdir()
    top = write(
        tmp_path / "deep",
        "top.toml",
        'extends = "../base.toml"\n[model]\nlayers = 3\n[data]\nsources = [{path = "x.txt"}, {path = "y"}]\n',
    )
    recipe = load_recipe(top, ["model.heads=2"])
    assert (recipe.model.layers, recipe.model.width, recipe.model.heads) == (3, 128, 2)
    assert recipe.optimizer.clip == 0.5
    assert recipe.model.vocabulary == load_recipe("demo").model.vocabulary
    assert [source.path for source in recipe.data.sources] == ["x.txt", "y"]


def test_a_duration_replaces_the_one_below_it():
    assert load_recipe("demo").duration.minutes == 10
    duration = load_recipe("demo", ["duration.tokens=1M"]).duration
    assert (duration.tokens, duration.minutes) == (1_000_000, 0)
    assert "exactly one" in refusal("demo", "duration.tokens=1M", "duration.minutes=5")


def test_extends_in_a_circle_is_refused(tmp_path):
    first = write(tmp_path, "a.toml", 'extends = "b.toml"\n')
    write(tmp_path, "b.toml", 'extends = "./a.toml"\n')
    assert "circle" in refusal(first)
    itself = write(tmp_path, "c.toml", 'extends = "c.toml"\n')
    assert "circle" in refusal(itself)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.layrs=3", "model.layers"),
        ("modle.layers=3", "model.layers"),
        ("MODEL.LAYERS=3", "did you mean model.layers?"),
        ("Layers=3", "did you mean model.layers?"),
        ("layers=3", "model.layers"),
        ("lr=3", "shot recipe keys"),
        ("optimiser.learning_rate=1", "optimizer.learning_rate"),
        ("data.sources.0.wieght=1", "data.sources.N.weight"),
        ("model.layers.deep=1", "model.layers"),
        ("extends=10M", "belongs in a file"),
        ("model.layers=three", "expected a number"),
        ("model.layers=1.5", "whole number"),
        ("model.layers=1e999", "out of range"),
        ("model.layers=nan", "expected a number"),
        ("model.rope_base=inf", "expected a number"),
        ("model.layers=", "expected a number"),
        ("--model.layers", "needs a value"),
        ("model.layers", "KEY=VALUE"),
        ("model.qk_norm=yes", "true or false"),
        ("duration.minutes=10m", "min"),
        ("duration.tokens=10GiB", "powers of 1000"),
        ("data.held_out=5percent", "45%"),
        ("data.skip=3", "a list, each"),
        ("data.skip=[1", "not a TOML value"),
        ("data.skip.0=3", "data.skip=[...]"),
        ("data.sources.7.path=x", "holds 1"),
        ("data.sources.x.path=x", "holds 1"),
        ("data.sources=python", "not a TOML value"),
        ('data.sources=[{pth = "x"}]', "data.sources.N.path"),
        ("model=3", "table"),
        ("=3", "KEY=VALUE"),
        ("evals.prompts=['\ud800']", "UTF-8"),
        ("seed=-1", "at least 0"),
    ],
)
def test_a_wrong_override_says_what_it_could_have_been(override, named):
    message = refusal("demo", override)
    assert named in message
    assert message.startswith(("command line: ", "demo with the command line"))


@pytest.mark.parametrize(
    ("overrides", "keys", "way_out"),
    [
        (["batch.tokens=1000"], "batch.tokens", "1024"),
        (["model.width=250"], "model.heads", "248 or 252"),
        (["model.kv_heads=3"], "model.kv_heads", "1, 2, 4"),
        (["model.head_width=33"], "odd", "even"),
        (["model.layers=0"], "model.layers", "more than 0"),
        (["model.heads=0"], "model.heads", "more than 0"),
        (["model.vocabulary=0"], "model.vocabulary", "data.tokenizer"),
        (["duration.minutes=0"], "duration", "tokens, flops and minutes"),
        (["duration.tokens=100"], "batch.tokens", "train longer"),
        (["model.rope_base=1"], "model.rope_base", "10000"),
        (
            ["model.heads=128", "model.head_width=2", "model.rope_scaling=ntk", "model.rope_original_context=64"],
            "model.rope_scaling",
            "wider heads",
        ),
        (["model.context=100B"], "model.context", "16777216"),
        (["duration.tokens=1M", "batch.ramp.0.tokens=100", "batch.ramp.0.until=0.1"], "batch.ramp.0.tokens", "256"),
        (["duration.tokens=1M", "batch.ramp.0.tokens=8192", "batch.ramp.0.until=0.1"], "batch.ramp.0", "at most"),
        (
            ["duration.tokens=1M", "batch.ramp.0.tokens=512", "batch.ramp.0.until=100%"],
            "batch.ramp.0.until",
            "between 0 and 1",
        ),
        (["batch.ramp.0.tokens=512", "batch.ramp.0.until=0.1"], "batch.ramp", "duration.tokens"),
        (["parallel.micro_tokens=3000"], "parallel.micro_tokens", "take 2048"),
        (["parallel.threads=100000"], "parallel.threads", "0 takes the cores"),
        (["schedule.decay=99%"], "schedule.warmup", "lower one"),
        (["schedule.kind=linear"], "schedule.kind", "wsd or cosine or constant"),
        (["optimizer.name=adam"], "optimizer.name", "muon, adamw or FILE.py:CLASS"),
        (["optimizer.beta2=1"], "optimizer.beta2", "less than 1"),
        (["data.held_out=0"], "data.held_out", "more than 0"),
        (["data.held_out=1"], "data.held_out", "less than 1"),
        (["data.sources=[]"], "data.sources", "at least one"),
        (["data.sources.0.weight=0"], "weight is 0", "at least one"),
        (["data.sources.0.weight=-1"], "data.sources.0.weight", "negative"),
        (["data.sources.0.format=csv"], "data.sources.0.format", "parquet"),
        (["data.sources.1.path=python"], "called python", "data.sources.1.name"),
        (["data.phases.0.weights.books=1"], "books", "there are python"),
        (["data.phases.0.weights.python=0"], "data.phases.0", "without weight"),
        (["data.phases.0.start=1"], "data.phases.0.start", "less than 1"),
        (["data.phases=[{start = 0.5}, {start = 0.5}]"], "data.phases.1.start", "come after"),
        (["data.skip=[4, 4]"], "data.skip", "once"),
        (["model.top_k=4"], "model.top_k = 4 is for experts", "set model.experts"),
        (["model.dense_layers=2"], "model.dense_layers", "leave model.dense_layers out"),
        (["model.router=sigmoid"], "model.router", "set model.experts"),
        (["model.balance_weight=0"], "model.balance_weight", "set model.experts"),
        (["model.encoder_pooling=2"], "model.encoder_pooling", "model.topology=encoder-decoder"),
        (["model.rope_original_context=128"], "model.rope_original_context", "set model.rope_scaling"),
        (["model.rope_factor=2"], "model.rope_factor", "yarn"),
    ],
)
def test_values_that_do_not_fit_together(overrides, keys, way_out):
    message = refusal("demo", *overrides)
    assert keys in message and way_out in message
    assert len(list(problems(load_recipe("demo", overrides, checked=False)))) == 1


def test_problems_lists_all_of_them():
    recipe = load_recipe("demo", ["model.heads=5", "batch.tokens=1000", "data.held_out=2"], checked=False)
    assert len(list(problems(recipe))) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"[model\nlayers = 3\n", "not valid TOML"),
        (b"[model]\nlayers = 3\n[mod", "at end of document"),
        (b"[model]\nlayers = 3\nlayers = 4\n", "line 3"),
        (b"\x7fELF\x02\x01\x00\x00", "binary"),
        (b'name = "caf\xe9"\n', "not UTF-8 (line 1)"),
        (b"a = " + b"[" * 100_000, "not valid TOML"),
        (b"#" * (2 << 20), "larger than 1 MiB"),
        (b"[modle]\nlayers = 3\n", "unknown section modle; did you mean model?"),
        (b"[model]\nlayrs = 3\n", "unknown key model.layrs; did you mean model.layers?"),
        (b"layers = 3\n", "did you mean model.layers?"),
        (b"model = 3\n", "expected a table"),
        (b"[model]\nlayers = true\n", "whole number"),
        (b"[model]\nlayers = 1e400\n", "finite"),
        (b"[model]\nrope_base = nan\n", "finite"),
        (b"[model]\nlayers = " + b"9" * 400 + b"\n", "finite"),
        (b"[model]\nlayers = " + b"9" * 5000 + b"\n", "not valid TOML"),
        (b"[data]\nsources = 'python'\n", "list of tables"),
        (b"[data]\nsources = ['python']\n", "table of keys"),
        (b"[evals]\nprompts = [1]\n", "evals.prompts.0"),
        (b"extends = 3\n", "extends"),
        (b"extends = 'dmeo'\n", "did you mean demo?"),
        (b"extends = './absent.toml'\n", "absent.toml: no such file"),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_line_that_names_it(tmp_path, content, said):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    message = refusal(str(path))
    assert (said in message and "mine.toml" in message) or "absent.toml" in message
    assert path.read_bytes() == content


def test_references_that_lead_nowhere(tmp_path):
    assert "did you mean demo?" in refusal("dmo")
    assert "no such file" in refusal("nowhere/mine.toml")
    assert "directory" in refusal(f"{tmp_path}/")
    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe("demo")))
    assert "did you mean" in refusal(str(tmp_path))
    assert "no preset ''" in refusal("")
    assert "cannot be read" in refusal("a\0b.toml")
    assert "no preset" in refusal("x" * 5000)
    assert "cannot be read" in refusal("x" * 5000 + ".toml")
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    assert "cannot be read" in refusal(str(loop))
    if os.geteuid():
        locked = tmp_path / "locked.toml"
        locked.write_text("seed = 1\n")
        locked.chmod(0)
        assert "cannot be read" in refusal(str(locked))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbfextends = 'demo'\nseed = 7\n")
    assert load_recipe(str(path)).seed == 7


KEY_PARTS = st.sampled_from(
    ["data", "sources", "phases", "weights", "model", "layers", "0", "1", "skip", "prompts", "x", ""]
)
VALUES = st.sampled_from(["1", "-1", "{}", "[]", "[{}]", "{a=1}", "'", '"x"', "1e999999", "9" * 5000, "x\ny = 2", "é"])


@settings(max_examples=300, deadline=None)
@given(st.lists(KEY_PARTS, min_size=1, max_size=5), VALUES | st.text(max_size=4), st.sampled_from(["{}={}", "--{}={}"]))
def test_whatever_is_typed_is_a_recipe_or_one_line(parts, value, style):
    token = style.format(".".join(parts), value)
    try:
        load_recipe("demo", [token], checked=False)
    except UsageError as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_whatever_is_in_a_file_is_a_recipe_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "any.toml"
    path.write_bytes(content)
    try:
        load_recipe(str(path))
    except UsageError as error:
        assert "any.toml" in str(error)


def test_a_vocabulary_below_bytes_and_special_tokens_is_refused():
    assert LEAST_VOCABULARY == SMALLEST
    with pytest.raises(UsageError, match=r"model\.vocabulary = 300 is too small.*525"):
        load_recipe("demo", ["model.vocabulary=300"])
