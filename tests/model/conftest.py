from __future__ import annotations

import pytest

from calledshot.data import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def read(path: str) -> bytes:\n    return open(path).read()\n"] * 20, 600)


@pytest.fixture(scope="session")
def transformers():
    transformers = pytest.importorskip("transformers")
    # In transformers 5 missing and unexpected keys are a report in the log, which must stay empty.
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_default_handler()
    return transformers
