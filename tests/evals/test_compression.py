"""The reference compressors against the program `xz`."""

import lzma
import shutil
import subprocess

import numpy as np
import pytest

from calledshot.data import prepare
from calledshot.evals import compression, compressors
from calledshot.recipe import Recipe, UsageError, schema


@pytest.fixture
def prepared(tmp_path):
    """Documents of random letters, each three times over: only who has read the training text can guess the others."""
    generator = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for number in range(40):
        letters = bytes(generator.integers(97, 123, 4000).astype(np.uint8)).decode()
        for copy in range(3):
            (tmp_path / "text" / f"{number}-{copy}.txt").write_text(letters)
    data = schema.Data(sources=(schema.Source(path=str(tmp_path / "text")),), held_out=0.1)
    return prepare(Recipe(data=data, model=schema.Model(vocabulary=576)), tmp_path)


def test_bits_per_byte_are_those_of_the_program(prepared):
    if not shutil.which("xz"):
        pytest.skip("no xz on this machine")
    found = compressors(prepared, "text")
    shards = prepared.source("text").held_out.shards
    text = b"".join(compression._text(prepared, shard) for shard in shards)
    assert len(text) == 4000 * prepared.source("text").held_out.documents
    size = len(subprocess.run(["xz", "-9e", "-c"], input=text, capture_output=True, check=True).stdout)
    assert found["xz -9e"] == pytest.approx(8 * size / len(text), rel=0.01)


def test_the_training_text_helps_as_far_as_it_holds_the_documents(prepared):
    found = compressors(prepared, "text")
    # 26 letters at random hold log2(26) = 4.70 bits each; a copy of something read before next to none.
    assert 3.0 < found["xz -9e"] < 5.0
    assert found["xz -9e given the training text"] < 0.6


def test_the_answer_is_kept(prepared, monkeypatch):
    first = compressors(prepared, "text")
    monkeypatch.setattr(lzma, "compress", None)
    assert compressors(prepared, "text") == first


def test_a_source_that_holds_nothing_out_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("one document " * 100)
    data = schema.Data(sources=(schema.Source(path=str(tmp_path / "one.txt")),))
    prepared = prepare(Recipe(data=data, model=schema.Model(vocabulary=576)), tmp_path)
    with pytest.raises(UsageError, match="one: holds no documents out"):
        compressors(prepared, "one")
