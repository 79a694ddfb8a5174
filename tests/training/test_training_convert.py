"""`shot convert` and `shot import`: runs made of other runs and of other people's models, to be used and trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from processes import Ended, shot, weights
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from calledshot.data import Tokenizer
from calledshot.rundir import RunDirectory
from calledshot.training import load_model, run_recipe
from calledshot.training.convert import extend

Train = Callable[..., tuple[RunDirectory, Ended]]
TOKENS = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(run: RunDirectory, step: int | None = None) -> torch.Tensor:
    model = load_model(run, step).model
    return model.logits(model.hidden_states(TOKENS))


def made(lab: Path, name: str, *arguments: str) -> RunDirectory:
    """The run that `shot ARGUMENTS --name NAME` makes."""
    ended = shot(lab, *arguments, "--name", name)
    assert ended.code == 0, ended.said
    run = RunDirectory.open(lab / "runs" / name)
    assert run.state() == "done" and run.complete_checkpoints() == [0]
    run.verify(0)
    assert not list((lab / "runs").glob(".*"))
    return run


def trained_on(lab: Path, name: str, *overrides: str) -> RunDirectory:
    """A run that begins with the checkpoint of a converted one, as the conversion said that it can."""
    recipe = str(Path("runs", name, "recipe.toml"))
    cut = ("duration.tokens=1280", "batch.tokens=128", "parallel.micro_tokens=0", "parallel.threads=1")
    quick = ("parallel.dtype=float32", "parallel.compile=off", "evals.tokens=256", "evals.final_tokens=256")
    ended = shot(lab, "train", recipe, "--from", f"{name}@0", "--name", f"{name}-on", *cut, *quick, *overrides)
    assert ended.code == 0, ended.said
    run = RunDirectory.open(lab / "runs" / f"{name}-on")
    assert [row["step"] for row in run.metrics()] == list(range(1, run.status()["step"] + 1))
    losses = [row["loss"] for row in run.metrics()]
    assert min(losses[1:]) < losses[0]
    return run


def test_a_dense_run_becomes_a_sparse_one_that_goes_on(lab: Path, reference: RunDirectory) -> None:
    options = ("convert", "upcycle", "reference@30", "--experts", "4", "--top-k", "2")
    run = made(lab, "sparse", *options)
    expected = logits(reference, 30)
    assert (logits(run) - expected).norm() / expected.norm() < 1e-5
    lineage = run.load("lineage")
    assert (lineage["parent"], lineage["step"], lineage["tokens"]) == ("reference", 30, 30 * 128)
    assert lineage["conversion"] == "upcycle" and lineage["fresh_optimizer"] is True
    recipe = run_recipe(run)
    assert (recipe.name, recipe.model.experts, recipe.model.expert_hidden) == ("sparse", 4, 128)
    counts = run.load("summary")["parameters"]
    assert counts["total"] == sum(p.numel() for p in load_model(run).model.parameters()) > counts["active"]
    assert not load_file(run.checkpoint_path(0) / "optimizer.safetensors")
    first = trained_on(lab, "sparse").metrics()[0]
    assert first["loss"] < 5 < reference.metrics()[0]["loss"], "it begins where its parent was"


def test_the_optimizer_may_come_along(lab: Path, reference: RunDirectory) -> None:
    run = made(lab, "kept", "convert", "upcycle", "reference@30", "--experts", "4", "--keep-optimizer")
    before = load_file(reference.checkpoint_path(30) / "optimizer.safetensors")
    after = load_file(run.checkpoint_path(0) / "optimizer.safetensors")
    momentum = after["blocks.1.experts.down_EDF.momentum"]
    assert momentum.shape == (4, 32, 128) and (momentum == before["blocks.1.down_DF.momentum"]).all()
    assert json.loads((run.checkpoint_path(0) / "state.json").read_text())["updates"] == 30
    trained_on(lab, "kept")


def test_key_heads_are_pooled(lab: Path, train: Train) -> None:
    parent, ended = train("many-heads", "model.kv_heads=2", "duration.tokens=1280")
    assert ended.code == 0, ended.said
    run = made(lab, "one-head", "convert", "kv-heads", "many-heads", "1")
    assert run_recipe(run).model.kv_heads == 1
    assert logits(run).isfinite().all() and not torch.equal(logits(run), logits(parent))
    trained_on(lab, "one-head")
    assert shot(lab, "generate", "one-head", "the", "--tokens", "4").code == 0


def test_a_context_is_extended_and_read_to_its_end(lab: Path, reference: RunDirectory) -> None:
    run = made(lab, "long", "convert", "extend", "reference", "--context", "256")
    model, batch = run_recipe(run).model, run_recipe(run).batch
    assert (model.rope_scaling, model.rope_factor, model.rope_original_context) == ("yarn", 8.0, 32)
    assert batch.tokens % 256 == 0
    assert weights(run, 0) == weights(reference, 60), "not a byte of them changes"
    prompt = "word " * 40
    assert "more than the model's context of 32" in shot(lab, "generate", "reference", prompt).said
    assert shot(lab, "generate", "long", prompt, "--tokens", "4").code == 0
    assert shot(lab, "eval", "long", "--tokens", "512").code == 0
    trained_on(lab, "long", "batch.tokens=256")


def test_a_quarter_of_a_million_tokens_is_a_recipe(lab: Path, reference: RunDirectory) -> None:
    run = extend(reference, 30, lab, "longest", 262_144, "base", 500.0)
    assert run_recipe(run).model.rope_base == 5e6
    # Without a factor, as often as the context is longer.
    assert run_recipe(extend(reference, 30, lab, "based", 64, "base")).model.rope_base == 2e4
    assert shot(lab, "recipe", "memory", str(run.path / "recipe.toml")).code == 0


@pytest.fixture(scope="module")
def foreign(lab: Path, reference: RunDirectory) -> Path:
    """A Qwen3 folder whose tokenizer is not the lab's: ordinary tokens are the same, specials have names of their
    own."""
    folder = lab / "foreign"
    assert shot(lab, "export", "reference", str(folder)).code == 0
    ours = Tokenizer.load(folder)
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [path.read_text() for path in sorted((lab / "corpus").iterdir())]
    theirs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=ours.begin, initial_alphabet=alphabet))
    theirs.add_special_tokens(["<s>", "</s>"])
    theirs.save(str(folder / "tokenizer.json"))
    file = folder / "config.json"
    ids = {"bos_token_id": theirs.token_to_id("<s>"), "eos_token_id": theirs.token_to_id("</s>")}
    file.write_text(json.dumps(json.loads(file.read_text()) | ids))
    return folder


def test_an_imported_model_is_a_run(lab: Path, foreign: Path) -> None:
    run = made(lab, "imported", "import", "foreign")
    recipe, tokenizer = run_recipe(run), load_model(run).tokenizer
    assert recipe.optimizer.transfer == "none" and recipe.model.qk_norm and recipe.model.tied_embeddings
    lineage = run.load("lineage")
    assert (lineage["parent"], lineage["class"]) == ("foreign", "Qwen3ForCausalLM")
    assert lineage["renamed_tokens"] == {"<s>": "<|begin|>", "</s>": "<|end|>"}
    assert recipe.model.vocabulary % 64 == 0 and recipe.model.vocabulary >= tokenizer.size
    text = next((lab / "corpus").iterdir())
    for command in (("generate", "imported", "the", "--tokens", "4"), ("eval", "imported", "--text", str(text))):
        assert shot(lab, *command).code == 0
    sources = 'data.sources=[{ path = "corpus" }]'
    mixed = trained_on(lab, "imported", sources, "objective.kind=ul2r", "optimizer.learning_rate=0.003")
    assert (mixed.path / "tokenizer.json").read_bytes() == (run.path / "tokenizer.json").read_bytes()
    assert shot(lab, "eval", "imported-on", "--tokens", "512").code == 0
    assert shot(lab, "export", "imported-on", "foreign-on").code == 0
    there = Tokenizer.load(lab / "foreign-on")
    assert there.special == tokenizer.special
    listed = shot(lab, "runs")
    assert listed.code == 0 and "imported" in listed.said
    assert shot(lab, "report", "imported", "-o", "imported.html").code == 0
    resumed = shot(lab, "resume", "imported")
    assert resumed.code == 0 and "is done" in resumed.said


def test_an_imported_recipe_can_be_trained_however_long_the_model_says_it_reads(lab: Path, foreign: Path) -> None:
    endless = lab / "endless"
    shutil.copytree(foreign, endless)
    file = endless / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 1_000_000}))
    ended = shot(lab, "import", "endless", "--name", "endless")
    assert ended.code == 0
    assert "it reads 32,768 of the 1,000,000 tokens that the model names; --context N takes more" in ended.said
    recipe = run_recipe(RunDirectory.open(lab / "runs" / "endless"))
    assert (recipe.model.context, recipe.batch.tokens) == (32_768, 8 * 32_768)
    assert (
        "batch.tokens=262144 optimizer.learning_rate=0.0001 data.sources.0.path=FILE duration.tokens=..." in ended.said
    )
    ended = shot(lab, "import", "endless", "--context", "32", "--name", "brief")
    assert ended.code == 0 and "--context N" not in ended.said
    recipe = run_recipe(RunDirectory.open(lab / "runs" / "brief"))
    assert (recipe.model.context, recipe.batch.tokens, recipe.duration.tokens) == (32, 64 * 32, 1000 * 64 * 32)
    own = ("batch.tokens=2048", "duration.tokens=6144", "optimizer.learning_rate=0.0001")  # as "Next" has them
    trained_on(lab, "brief", 'data.sources=[{ path = "corpus" }]', *own)
    ended = shot(lab, "import", "foreign", "--context", "64", "--name", "x")
    assert ended.code == 2 and "the model reads 32 tokens" in ended.complaint


def test_an_encoder_decoder_goes_out_as_t5_and_comes_back(lab: Path, train: Train) -> None:
    shape = (
        "model.topology=encoder-decoder", "model.positions=t5", "model.feed_forward=geglu", "model.qk_norm=false",
        "model.kv_heads=2", "model.exportable_to=t5", "evals.final_tokens=256",
    )  # fmt: skip
    run, ended = train("small-t5", *shape, "objective.kind=span", "duration.tokens=1280")
    assert ended.code == 0, ended.said
    assert shot(lab, "export", "small-t5", "small-t5-hf").code == 0
    back = made(lab, "t5-again", "import", "small-t5-hf")
    for name, tensor in load_file(run.checkpoint_path(10) / "model.safetensors").items():
        # Heads of 16: the root that T5's queries hold is a power of two.
        assert (load_file(back.checkpoint_path(0) / "model.safetensors")[name] == tensor).all(), name
    assert run_recipe(back).objective.kind == "span"
    trained_on(lab, "t5-again", 'data.sources=[{ path = "corpus" }]')


def test_a_prefix_model_is_exported_with_a_warning(lab: Path, train: Train) -> None:
    _, ended = train("prefix", "model.topology=prefix", "objective.kind=prefix", "duration.tokens=1280")
    assert ended.code == 0, ended.said
    ended = shot(lab, "export", "prefix", "prefix-hf")
    assert ended.code == 0 and "4-D additive mask" in ended.said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "upcycle", "referense", "--experts", "4", "--name", "x"), "did you mean 'reference'"),
        (("convert", "upcycle", "reference@31", "--experts", "4", "--name", "x"), "no complete checkpoint of step 31"),
        (("convert", "upcycle", "reference", "--experts", "1", "--name", "x"), "--experts 1"),
        (("convert", "upcycle", "reference", "--experts", "4", "--noise", "-1", "--name", "x"), "--noise -1"),
        (("convert", "upcycle", "reference", "--experts", "4", "--name", "a/b"), "without / and @"),
        (("convert", "upcycle", "reference", "--experts", "4", "--name", "reference"), "is a run already"),
        (("convert", "kv-heads", "reference", "1", "--name", "x"), "it has only one"),
        (("convert", "extend", "reference", "--context", "32", "--name", "x"), "reads 32 tokens already"),
        (("convert", "extend", "reference", "--context", "64", "--factor", "0.5", "--name", "x"), "--factor 0.5"),
        (("import", "nowhere", "--name", "x"), "nowhere: no such folder"),
        (("import", "corpus", "--name", "x"), "config.json: is missing"),
        (("import", "hf:nonsense", "--name", "x"), "hf:OWNER/NAME"),
        (("import", "hf:a/b/c", "--name", "x"), "leave out /c"),
        (("train", "tiny.toml", "--name", "x", "model.exportable_to=llama"), "model.qk_norm=false"),
        (("train", "tiny.toml", "--name", "x", "model.exportable_to=t5"), "model.topology=encoder-decoder"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    lab: Path, reference: RunDirectory, arguments: tuple[str, ...], words: str
) -> None:
    ended = shot(lab, *arguments)
    assert ended.code == 2
    assert words in ended.complaint
    assert not (lab / "runs" / "x").exists() and not list((lab / "runs").glob(".*"))
