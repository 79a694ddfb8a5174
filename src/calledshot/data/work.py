"""Tokenising one chunk; and, as `python -m calledshot.data.work`, the process that does so for `prepare`.

Plain subprocesses rather than multiprocessing: they do not run the caller's script again, share no locks with a
process in which torch has started threads, and end by themselves when it is killed, at the end of their standard
input.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calledshot.data.readers import Chunk, File, read
from calledshot.data.shards import Shard, ShardWriter, dtype_for
from calledshot.data.splitting import document_hash
from calledshot.data.tokenizer import Tokenizer, as_array
from calledshot.recipe import RunError, ShotError
from calledshot.recipe.schema import Source
from calledshot.rundir import read_json, write_json

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Task:
    """A chunk to tokenise, and where to."""

    folder: str
    """The prepared folder."""
    stem: str
    """Folder of the source inside it."""
    number: int
    """Of the chunk, within its source."""
    chunk: Chunk
    source: Source
    threshold: int
    """Documents whose hash is below are held out."""
    tokenizer: str
    """sha256 of the folder's tokenizer.json."""
    encoder: str

    @property
    def marker(self) -> Path:
        """Written last: where it is, the chunk is done."""
        return Path(self.folder) / self.stem / f"chunk-{self.number:05d}.json"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Task:
        chunk = record["chunk"]
        files = tuple(File(**file) for file in chunk["files"])
        source = Source(**{**record["source"], "exclude": tuple(record["source"]["exclude"])})
        return cls(**{**record, "chunk": Chunk(**{**chunk, "files": files}), "source": source})


@dataclass(frozen=True)
class Result:
    """What a chunk gave."""

    shards: dict[str, list[Shard]]
    """By split."""
    skipped: dict[str, int]
    """Documents left out, by reason."""


def finished(task: Task) -> Result | None:
    """The result of a chunk that an earlier attempt has finished, if every file of it is as it was written."""
    try:
        record = read_json(task.marker)
    except RunError:
        return None
    if not record or record["tokenizer"] != task.tokenizer:
        return None
    shards = {split: [Shard.from_json(shard) for shard in record["shards"][split]] for split in SPLITS}
    folder = Path(task.folder)
    if any(shard.problem(folder, hashes=True) for split in SPLITS for shard in shards[split]):
        return None
    return Result(shards, record["skipped"])


def tokenise(task: Task, tokenizer: Tokenizer, advance: Callable[[int], None]) -> None:
    """Write the shards of a chunk, then its marker."""
    folder = Path(task.folder)
    (folder / task.stem).mkdir(parents=True, exist_ok=True)
    dtype = dtype_for(tokenizer.size)
    writers = {split: ShardWriter(folder, f"{task.stem}/{split}-{task.number:05d}", dtype) for split in SPLITS}
    skipped: Counter[str] = Counter()
    for document in read(task.chunk, task.source, skipped, advance):
        split = "held_out" if document_hash(document.id) < task.threshold else "train"
        ids = as_array(tokenizer, document.text, dtype)
        if len(ids) == 2:  # a tokenizer that normalises can leave nothing of a text
            skipped["empty"] += 1
            continue
        writers[split].add(ids, len(document.text.encode()), document.language, document.id)
    shards = {split: [shard.to_json() for shard in writers[split].finish()] for split in SPLITS}
    write_json(task.marker, {"tokenizer": task.tokenizer, "shards": shards, "skipped": dict(skipped)})


def main() -> None:
    """Tasks as JSON lines on standard input; lines of `{"advance": bytes}` and then `{"done": true}` or an error on
    output."""
    tokenizers: dict[str, Tokenizer] = {}

    def say(**message: object) -> None:
        print(json.dumps(message), flush=True)

    for line in sys.stdin:
        task = Task.from_json(json.loads(line))
        try:
            if task.tokenizer not in tokenizers:
                tokenizers[task.tokenizer] = Tokenizer.load(Path(task.folder) / "tokenizer.json", task.encoder)
            tokenise(task, tokenizers[task.tokenizer], lambda size: say(advance=size))
        except ShotError as error:
            say(error=str(error), exit_code=error.exit_code)
        except OSError as error:
            say(error=str(error), errno=error.errno, path=error.filename)
        else:
            say(done=True)


if __name__ == "__main__":
    main()
