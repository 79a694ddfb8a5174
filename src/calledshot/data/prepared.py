"""A prepared folder: a tokenizer, the shards of every source, and the manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calledshot.data.shards import Shard, dtype_for
from calledshot.data.tokenizer import Tokenizer, reload
from calledshot.recipe import RunError, UsageError
from calledshot.rundir import RunDirectory, find_lab, read_json

MANIFEST = "manifest.json"
FORMAT = 1

VERIFIED_AT_OPENING = 1 << 30
"""Folders up to this many bytes have their hashes checked when a process first opens them; larger ones on request."""

_verified: set[str] = set()


@dataclass(frozen=True)
class Split:
    """The training or the held-out documents of a source."""

    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Targets in one pass: every token but each document's begin."""
        return sum(shard.ids - shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the documents' texts."""
        return sum(shard.bytes for shard in self.shards)

    def languages(self, folder: Path) -> dict[str, dict[str, int]]:
        """Documents, tokens and bytes by language, most bytes first."""
        found: dict[str, Counter[str]] = {}
        for shard in self.shards:
            index = shard.index(folder)
            for number, language in enumerate(shard.languages):
                mine = index[index["language"] == number]
                counts = {
                    "documents": len(mine),
                    "tokens": int(mine["ids"].sum()) - len(mine),
                    "bytes": int(mine["bytes"].sum()),
                }
                found.setdefault(language, Counter()).update(counts)
        return {name: dict(counts) for name, counts in sorted(found.items(), key=lambda item: -item[1]["bytes"])}


@dataclass(frozen=True)
class SourceShards:
    """What a source has become."""

    name: str
    path: str
    """As in the recipe."""
    revision: str
    """Commit on the hub; empty for files."""
    train: Split
    held_out: Split
    skipped: dict[str, int]
    """Files and documents left out, by reason."""

    @property
    def bytes_per_token(self) -> float:
        """Of training and held-out documents together; a document's end counts as a token."""
        tokens = self.train.tokens + self.held_out.tokens
        return (self.train.bytes + self.held_out.bytes) / tokens if tokens else 0.0


@dataclass(frozen=True)
class Prepared:
    """An opened folder."""

    path: Path
    key: str
    """Hash of everything that decided its content."""
    digest: str
    """sha256 of the manifest."""
    tokenizer: Tokenizer
    sources: tuple[SourceShards, ...]

    @classmethod
    def open(cls, path: Path | str, verify: bool | None = None) -> Prepared:
        """Open a finished folder, without looking at the sources again.

        Sizes are always checked. Hashes are checked with `verify`, and without it once a process where all is below 1
        GiB. Raises RunError, naming the file, where one is missing or corrupt.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None:
            raise UsageError(
                f"{path}: holds no {MANIFEST}, so nothing was prepared there to the end; run `shot data build`"
            )
        digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        sources = tuple(_source(record) for record in manifest["sources"])
        shards = [shard for source in sources for split in (source.train, source.held_out) for shard in split.shards]
        identity = f"{path.resolve()} {digest}"
        small = sum(sum(shard.sizes.values()) for shard in shards) < VERIFIED_AT_OPENING
        hashes = verify if verify is not None else small and identity not in _verified
        check(path, shards, hashes)
        tokenizer_file = path / "tokenizer.json"
        tokenizer = reload(tokenizer_file, manifest["tokenizer"]["encoder"])
        if hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() != manifest["tokenizer"]["sha256"]:
            raise RunError(
                f"{tokenizer_file}: corrupt: its hash is not the manifest's; delete {path} and run `shot data build`"
            )
        if hashes:
            _verified.add(identity)
        return cls(path, manifest["key"], digest, tokenizer, sources)

    @classmethod
    def of_run(cls, run: RunDirectory, otherwise: str = "") -> Prepared:
        """What a run was trained on, from its own lab or from the one around the current folder.

        UsageError where neither has it: it may be gigabytes, and the run a copy far from its sources, so that it is
        not made anew unasked. `otherwise` is one more way out, to end the line with.
        """
        name = run.load("data").get("folder")
        if not name:
            raise UsageError(f"{run.path}: has no data.json, so which data it was trained on is not known; {otherwise}")
        places = dict.fromkeys(lab / "data" for lab in (run.path.absolute().parent.parent, find_lab()))
        for place in places:
            if (place / name / MANIFEST).is_file():
                return cls.open(place / name)
        ways = ["bring that folder from its own lab", f"prepare it anew with `shot data build {run.path}/recipe.toml`"]
        raise UsageError(
            f"{run.path}: the data it was trained on, {name}, are not in {' or '.join(map(str, places))}; "
            + ", or ".join([*ways, *([otherwise] if otherwise else [])])
        )

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids in the shards."""
        return dtype_for(self.tokenizer.size)

    def source(self, name: str) -> SourceShards:
        """The source of this name."""
        for source in self.sources:
            if source.name == name:
                return source
        raise UsageError(f"no source is called {name!r}; there are {', '.join(source.name for source in self.sources)}")

    def record(self) -> dict[str, Any]:
        """What a run keeps as data.json: the folder, and the shards with their hashes."""
        return {
            "folder": self.path.name,
            "key": self.key,
            "manifest_sha256": self.digest,
            "tokenizer": {"size": self.tokenizer.size, "encoder": self.tokenizer.encoder},
            "sources": [
                {
                    "name": source.name,
                    "path": source.path,
                    "revision": source.revision,
                    "bytes_per_token": source.bytes_per_token,
                    **{name: _brief(split) for name, split in (("train", source.train), ("held_out", source.held_out))},
                }
                for source in self.sources
            ],
        }


def _brief(split: Split) -> dict[str, Any]:
    return {
        "documents": split.documents,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "shards": {shard.stem: shard.sha256[".bin"] for shard in split.shards},
    }


def _source(record: dict[str, Any]) -> SourceShards:
    splits = {name: Split(tuple(map(Shard.from_json, record[name]))) for name in ("train", "held_out")}
    return SourceShards(record["name"], record["path"], record["revision"], skipped=record["skipped"], **splits)


def check(folder: Path, shards: Iterable[Shard], hashes: bool) -> None:
    """Raise RunError where a file is missing or not what the manifest says."""
    for shard in shards:
        problem = shard.problem(folder, hashes)
        if problem:
            raise RunError(f"{problem}; delete that file and run `shot data build`, which makes it anew")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none yet."""
    manifest = read_json(folder / MANIFEST)
    if manifest is not None and manifest.get("format") != FORMAT:
        raise UsageError(
            f"{folder}: written by another version of calledshot; prepare it again in another lab, or delete it"
        )
    return manifest


def digest_of(value: object) -> str:
    """sha256 of a value's JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
