"""Suite files: what they may say, and how a mistake in one is told."""

import tomllib
from pathlib import Path

import pytest

from calledshot.experiment import load_suite, resolve, suites
from calledshot.experiment.suite import problems, read_suite
from calledshot.recipe import UsageError

WHOLE = """
seeds = [0, 1]
[[sizes]]
name = "S"
tokens = "100k"
[[arms]]
name = "a"
[[arms]]
name = "b"
"""


def read(text: str):
    return read_suite(tomllib.loads(text), "file.toml", Path("folder/file.toml"))


def test_what_is_left_out_has_its_meaning():
    suite = read(WHOLE)
    assert (suite.name, suite.baseline, suite.match) == ("file", "a", "parameters")
    assert suite.sizes[0].tokens == 100_000
    assert not list(problems(suite))


def test_only_compared_arms_get_every_seed():
    suite = read('comparisons = [["b", "c"]]\n' + WHOLE + '[[arms]]\nname = "c"\n[[arms]]\nname = "d"\n')
    seeds = {arm.name: suite.seeds_of(arm, suite.sizes[0]) for arm in suite.arms}
    assert seeds == {"a": (0, 1), "b": (0, 1), "c": (0, 1), "d": (0,)}
    every = read(WHOLE)
    assert {every.seeds_of(arm, every.sizes[0]) for arm in every.arms} == {(0, 1)}
    cheap = read(WHOLE.replace('tokens = "100k"', 'tokens = "100k"\nseeds = [4, 5, 6]'))
    assert {cheap.seeds_of(arm, cheap.sizes[0]) for arm in cheap.arms} == {(4, 5, 6)}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sede = [1]", "unknown key sede; did you mean seeds?"),
        ("set.model.kv_head = 1", "unknown key set.model.kv_head; did you mean model.kv_heads?"),
        ("model.layers = 2", "unknown key model; keys of the recipe stand under set"),
        ("set.seed = 1", "set.seed: the suite gives each run its own seed"),
        ('comparisons = ["a", "b"]', "comparisons: expected pairs of arms"),
        ("arms = 3", "arms: expected tables, each under [[arms]]"),
        ('set.model.layers = "many"', "set.model.layers = 'many'"),
    ],
)
def test_a_mistake_is_told_with_its_place(line, said):
    with pytest.raises(UsageError) as error:
        read(line)
    assert str(error.value).startswith("file.toml: ") and said in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "b"', 'name = "a"', "two arms are called a"),
        ('name = "b"', 'name = "b/c"', "arms.1.name = 'b/c'"),
        ('name = "b"', 'name = "b"\nsizes = ["L"]', "arm b: there is no size 'L': there are S"),
        ('name = "b"', 'name = "b"\nmatch = "time"', "match = 'time': choose parameters or"),
        ('tokens = "100k"', "", "size S: exactly one of tokens and flops"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds = [0, 0]: each once"),
        ("seeds = [0, 1]", 'baseline = "z"', "there is no arm 'z': there are a, b"),
        ("seeds = [0, 1]", "set.duration.tokens = 5", "set.duration: how long runs are"),
        ("seeds = [0, 1]", "seeds = []", "seeds is empty"),
        ('name = "b"', 'name = "b"\nstart = "a"', "arm b: start and convert belong together"),
        ('name = "b"', 'name = "b"\nstart = "c"\nconvert = ["x"]', "arm b: start = 'c' is no arm further up"),
        ('name = "b"', 'name = "b"\nat.L.model.layers = 3', "arm b: there is no size 'L'"),
        ("seeds = [0, 1]", 'evals = [{ name = "e", arms = ["z"] }]', "there is no arm 'z'"),
        ("seeds = [0, 1]", 'judge = "e"', "judge = 'e' is none of the evals"),
    ],
)
def test_what_does_not_fit_together_is_told(old, new, said, tmp_path):
    path = tmp_path / "file.toml"
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(UsageError, match="file") as error:
        load_suite(str(path))
    assert said in str(error.value)


def test_a_suite_is_found_by_name_and_a_typo_is_not():
    assert load_suite("attention").name == "attention"
    assert load_suite("attention", name="mine").run_name("mqa", "1M", "s0") == "mine-mqa-1M-s0"
    with pytest.raises(UsageError, match="did you mean attention"):
        load_suite("atention")


@pytest.mark.parametrize("name", sorted(suites()))
def test_every_suite_that_comes_along_resolves(name):
    suite = load_suite(name)
    cells = resolve(suite)
    assert {size for _, size in cells} == {size.name for size in suite.sizes}
    assert suite.about and all(arm.note for arm in suite.arms)
    for cell in cells.values():
        assert cell.pending or cell.recipe.duration.tokens <= 1_010_000
        assert cell.changed or cell.arm is suite.reference, f"{cell.arm.name} changes nothing"


def test_keys_of_the_command_line_reach_every_run():
    suite = load_suite("attention", ["data.sources.0.path=texts.jsonl", "--model.context", "128"])
    for cell in resolve(suite).values():
        assert cell.recipe.data.sources[0].path == "texts.jsonl"
        assert cell.recipe.model.context == 128
    with pytest.raises(UsageError, match="seed: the suite gives each run its own"):
        resolve(load_suite("attention", ["seed=3"]))


def test_the_suite_in_the_documents_is_one(tmp_path):
    document = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text(encoding="utf-8")
    (tmp_path / "wide.toml").write_text(document.split("```toml\n")[1].split("```")[0])
    cells = resolve(load_suite(str(tmp_path / "wide.toml")))
    assert cells["words", "1M"].adjusted.key == "model.hidden"
