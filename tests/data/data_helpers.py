"""Small corpora and recipes for this room's tests."""

import json
import random
from pathlib import Path

from calledshot.recipe.schema import Batch, Data, Duration, Model, Recipe, Source

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "saw",
    "two",
    "dogs",
    "run",
    "past",
    "42",
    "trees",
    "while",
    "rain",
    "fell",
    "softly",
)


def story(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(words)) + ".\n"


def write_jsonl(path: Path, documents: int, seed: int = 0, longest: int = 200) -> Path:
    """Documents of 1 to `longest` words; every third is in another language."""
    chance = random.Random(seed)
    with open(path, "w") as stream:
        for number in range(documents):
            text = story(seed * 100_003 + number, chance.randint(1, longest))
            language = "de" if number % 3 == 0 else "en"
            stream.write(json.dumps({"id": f"{path.stem}-{number}", "text": text, "lang": language}) + "\n")
    return path


def recipe_for(
    *sources: Source, context: int = 32, rows: int = 4, vocabulary: int = 700, steps: int = 10, seed: int = 0, **data
) -> Recipe:
    return Recipe(
        seed=seed,
        data=Data(sources=sources, **data),
        model=Model(vocabulary=vocabulary, context=context),
        batch=Batch(tokens=rows * context),
        duration=Duration(tokens=steps * rows * context),
    )
