"""What follows from a recipe without being written in it: the model's full shape, the sources' names."""

import re
from dataclasses import asdict, dataclass

from .schema import Data, Model, Source


@dataclass(frozen=True)
class Shape(Model):
    """The model's keys with `head_width` and `hidden` resolved; `vocabulary` stays 0 where the tokenizer decides it."""


def shape(model: Model) -> Shape:
    """The full shape: C = width / heads and F = 8/3 of the width, rounded up to a multiple of 64, where they are 0."""
    keys = asdict(model)
    keys["head_width"] = model.head_width or model.width // model.heads
    keys["hidden"] = model.hidden or -(-8 * model.width // (3 * 64)) * 64
    return Shape(**keys)


def source_name(source: Source) -> str:
    """How tables call a source: its own name, else the data set's, file's or folder's in its path."""
    if source.name:
        return source.name
    if source.path.startswith("hf:"):
        return "/".join(source.path[3:].split("/")[1:2]) or source.path[3:]
    parts = [part for part in re.split(r"[/\\]", source.path) if part not in ("", ".", "..")]
    fixed = [part for part in parts if not set(part) & set("*?[")] or ["text"]
    last = fixed[-1]
    return (last.split(".")[0] or last) if fixed == parts else last


def source_names(data: Data) -> tuple[str, ...]:
    """The name of each source, in order."""
    return tuple(source_name(source) for source in data.sources)
