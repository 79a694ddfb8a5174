"""Runs with a checkpoint, made without training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calledshot.data import prepare
from calledshot.model import Decoder
from calledshot.recipe import Recipe, identity, schema, to_toml
from calledshot.rundir import RunDirectory
from calledshot.training import state

WORDS = (
    "the",
    "a",
    "run",
    "model",
    "of",
    "token",
    "loss",
    "held",
    "out",
    "mask",
    "row",
    "batch",
    "step",
    "text",
    "byte",
)


def write_corpus(folder: Path) -> None:
    """Two sources: English and German documents in JSONL, and text files."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[n] for n in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    lengths = torch.randint(3, 200, (120,), generator=generator).tolist()
    (folder / "prose.jsonl").write_text(
        "".join(
            json.dumps({"id": f"d{n}", "text": text(length), "lang": "de" if n % 3 else "en"}) + "\n"
            for n, length in enumerate(lengths)
        )
    )
    (folder / "notes").mkdir()
    for number in range(30):
        (folder / "notes" / f"{number}.txt").write_text(text(60) + " ünï\n")


def small_recipe(lab: Path) -> Recipe:
    prose = schema.Source(path=str(lab / "prose.jsonl"), name="prose", language_field="lang")
    notes = schema.Source(path=str(lab / "notes"), name="notes")
    return Recipe(
        data=schema.Data(sources=(prose, notes), held_out=0.2),
        model=schema.Model(layers=2, width=32, heads=4, kv_heads=2, vocabulary=576, context=48),
        batch=schema.Batch(tokens=96),
        duration=schema.Duration(tokens=960),
    )


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A lab with prepared data."""
    lab = tmp_path_factory.mktemp("lab")
    write_corpus(lab)
    prepare(small_recipe(lab), lab)
    return lab


@pytest.fixture(scope="session")
def make_run(lab) -> Callable[..., RunDirectory]:
    """Makes a run in the lab with a checkpoint of the model as `fill` leaves it."""

    def make(
        name: str, fill: Callable[[Decoder], None], topology: str = "decoder", kind: str = "causal", context: int = 48
    ) -> RunDirectory:
        recipe = small_recipe(lab)
        model = replace(recipe.model, topology=topology, context=context)
        recipe = replace(
            recipe, model=model, objective=schema.Objective(kind=kind), batch=schema.Batch(tokens=2 * context)
        )
        prepared = prepare(recipe, lab)
        run = RunDirectory.create(lab / "runs" / name, recipe_toml=to_toml(recipe), identity=identity(recipe))
        prepared.tokenizer.save(run.path / "tokenizer.json")
        run.save("data", prepared.record())
        decoder = Decoder(recipe.model).requires_grad_(False)
        fill(decoder)
        state.save(run, state.Counters(step=7, tokens=672), decoder.state_dict(), {})
        return run

    return make


def randomise(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0.0, parameter.size(-1) ** -0.5, generator=generator)


@pytest.fixture(scope="session")
def random_weights() -> Callable[[Decoder], None]:
    return randomise


@pytest.fixture(scope="session")
def random_run(make_run) -> RunDirectory:
    """Every weight random."""
    return make_run("random", randomise)


@pytest.fixture(scope="session")
def uniform_run(make_run) -> RunDirectory:
    """As initialised: all tokens equally likely."""
    return make_run("uniform", lambda decoder: decoder.initialise(torch.Generator().manual_seed(0)))
