"""Text to batches: sources, tokenizer, token shards, and `batch(step)` as a pure function of the recipe."""

from calledshot.data.asking import Asking
from calledshot.data.batches import Batches, Origin
from calledshot.data.heldout import HeldOut
from calledshot.data.infilling import Infilling
from calledshot.data.prepare import prepare, prepared_folder
from calledshot.data.prepared import Prepared, SourceShards
from calledshot.data.scores import Score, Selection
from calledshot.data.tokenizer import Tokenizer

__all__ = [
    "Asking",
    "Batches",
    "HeldOut",
    "Infilling",
    "Origin",
    "Prepared",
    "Score",
    "Selection",
    "SourceShards",
    "Tokenizer",
    "prepare",
    "prepared_folder",
]
