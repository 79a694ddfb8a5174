"""Preparing a recipe's data: sources, tokenizer, shards, in a folder that is named by what decides its content."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from calledshot.data import hub
from calledshot.data.prepared import FORMAT, MANIFEST, Prepared, digest_of, read_manifest
from calledshot.data.readers import read
from calledshot.data.shards import SUFFIXES, file_hash
from calledshot.data.sources import Corpus, resolve
from calledshot.data.splitting import document_hash, threshold
from calledshot.data.tokenizer import Tokenizer, check_size
from calledshot.data.work import SPLITS, Result, Task, finished
from calledshot.data.workers import work_off
from calledshot.recipe import Recipe, RunError, UsageError
from calledshot.rundir import write_json

SAMPLE = 64 << 20
"""Characters of text that a tokenizer is trained on at most; the sources share them equally."""

SAMPLED_CHUNKS = 256
"""Places in a source from which that sample is taken."""

COMPARED = 4 << 20
"""Characters of documents on which both encoders must agree before the faster one is used."""

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much of it, of how much)."""


def _silent(stage: str, done: int, total: int) -> None:
    pass


def prepare(recipe: Recipe, lab: Path | str, progress: Progress | None = None) -> Prepared:
    """The prepared data of a recipe, in `lab/data/NAME-HASH/`.

    Made where it is missing, continued where an earlier attempt was interrupted, opened where it is done. A second
    process that asks for the same folder waits for the first. The folder's hash covers the sources' files with their
    content, the tokenizer and the held-out share; weights, order and context do not change it.

    Raises UsageError for sources that cannot be used as they are, RunError for corrupt shards and a full disk.
    """
    progress = progress or _silent
    progress("sources", 0, 1)
    corpora, given, key, folder = _ask(recipe, Path(lab))
    progress("sources", 1, 1)
    if not _complete(folder):
        with locked(folder) as lock:
            try:
                if not _complete(folder):
                    _build(recipe, corpora, given, key, folder, lock, progress)
            except BaseException as error:
                _clear(folder, isinstance(error, UsageError))
                raise
    prepared = Prepared.open(folder)
    check_size(prepared.tokenizer, recipe.model.vocabulary)
    return prepared


def prepared_folder(recipe: Recipe, lab: Path | str) -> Path:
    """Where a recipe's prepared data are, or would be: looks at the sources, and makes nothing."""
    return _ask(recipe, Path(lab))[-1]


def _ask(recipe: Recipe, lab: Path) -> tuple[list[Corpus], Path | None, str, Path]:
    """What a recipe names: its corpora, a tokenizer.json if it is given one, the key of both, and the folder."""
    corpora = resolve(recipe.data, lab)
    given = _given_tokenizer(recipe, lab)
    key = _key(recipe, corpora, given)
    return corpora, given, key, lab / "data" / f"{_folder_name(corpora)}-{key[:12]}"


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Make the folder where it is missing, hold its lock, and give the lock's descriptor; waits while another process
    has it.

    A killed process lets go of it, once those that inherited the descriptor have ended too.
    """
    while (descriptor := _lock(folder)) is None:
        pass
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock; None where who had it before has failed, and removed the folder with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror})") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), os.stat(folder / "lock")):
            return descriptor
    os.close(descriptor)
    return None


def _clear(folder: Path, useless: bool) -> None:
    """Remove a folder in which a failed attempt left nothing to continue from: no finished chunk, and no tokenizer
    either unless that is `useless` too. For the holder of its lock."""
    done = [*folder.glob("sources/*/chunk-*.json"), *folder.glob(MANIFEST)]
    if not done and (useless or not (folder / "tokenizer.json").exists()):
        shutil.rmtree(folder, ignore_errors=True)


def _complete(folder: Path) -> bool:
    """Whether a manifest is there with all its files; a missing one is made anew, a corrupt one is for `Prepared.open`
    to report."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    stems = [shard["stem"] for source in manifest["sources"] for split in SPLITS for shard in source[split]]
    return all((folder / f"{stem}{suffix}").exists() for stem in stems for suffix in SUFFIXES)


def _given_tokenizer(recipe: Recipe, lab: Path) -> Path | None:
    """The tokenizer.json that the recipe names; None where one is to be trained."""
    written = recipe.data.tokenizer
    if written == "bpe":
        if not recipe.model.vocabulary:
            raise UsageError(
                "model.vocabulary: 0 follows a tokenizer that exists; say how many entries a `bpe` is to have"
            )
        return None
    if written.startswith("hf:"):
        return hub.download_tokenizer(written)
    path = Path(os.path.expanduser(written))
    path = path if path.exists() else lab / path
    return path / "tokenizer.json" if path.is_dir() else path


def _key(recipe: Recipe, corpora: Sequence[Corpus], given: Path | None) -> str:
    if given is None:
        tokenizer = ["bpe", recipe.model.vocabulary]
    else:
        if not given.is_file():
            raise UsageError(
                f"data.tokenizer: {given}: no such file; take `bpe`, a tokenizer.json, its folder or hf:OWNER/NAME"
            )
        tokenizer = ["given", file_hash(given)]
    listings = []
    for corpus in corpora:
        source = asdict(corpus.source)
        # Where the files lie and how much of them a run takes does not change what they become.
        for field in ("path", "weight", "max_epochs", "exclude", "format"):
            del source[field]
        files = [
            (file.name, file.format, file.size, fingerprint)
            for file, fingerprint in zip(corpus.files, corpus.fingerprints, strict=True)
        ]
        listings.append([source, files, corpus.revision])
    return digest_of([FORMAT, tokenizer, recipe.data.held_out, listings])


def _folder_name(corpora: Sequence[Corpus]) -> str:
    return "+".join(_slug(corpus.source.name) for corpus in corpora)[:48]


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "source"


def _build(
    recipe: Recipe, corpora: Sequence[Corpus], given: Path | None, key: str, folder: Path, lock: int, progress: Progress
) -> None:
    thresholds = [threshold(corpus, recipe.data.held_out) for corpus in corpora]
    tokenizer = _tokenizer(recipe, corpora, thresholds, given, folder, progress)
    check_size(tokenizer, recipe.model.vocabulary)
    digest = file_hash(folder / "tokenizer.json")
    tasks = [
        Task(str(folder), _stem(place, corpus), number, chunk, corpus.source, limit, digest,
             tokenizer.encoder)
        for place, (corpus, limit) in enumerate(zip(corpora, thresholds, strict=True))
        for number, chunk in enumerate(corpus.chunks())
    ]  # fmt: skip
    results = {task.marker: finished(task) for task in tasks}
    work_off([task for task in tasks if results[task.marker] is None], tokenizer, tasks, lock, progress)
    records = []
    for place, corpus in enumerate(corpora):
        mine = [task for task in tasks if task.stem == _stem(place, corpus)]
        records.append(_record(corpus, [results[task.marker] or _finished_now(task) for task in mine]))
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "key": key,
            "held_out": recipe.data.held_out,
            "tokenizer": {"sha256": digest, "size": tokenizer.size, "encoder": tokenizer.encoder},
            "sources": records,
        },
    )


def _stem(place: int, corpus: Corpus) -> str:
    return f"sources/{place}-{_slug(corpus.source.name)}"


def _finished_now(task: Task) -> Result:
    result = finished(task)
    if result is None:
        raise RunError(f"{task.marker}: what was just written there does not read back as written; check the disk")
    return result


def _record(corpus: Corpus, results: Sequence[Result]) -> dict:
    shards = {split: [shard for result in results for shard in result.shards[split]] for split in SPLITS}
    if not shards["train"]:
        raise UsageError(
            f"data.sources: {corpus.source.path}: no document is left to train on "
            f"({sum(shard.documents for shard in shards['held_out'])} held out); add text"
        )
    skipped: Counter[str] = Counter(dict(corpus.skipped))
    for result in results:
        skipped.update(result.skipped)
    return {
        "name": corpus.source.name,
        "path": corpus.source.path,
        "revision": corpus.revision,
        "skipped": dict(skipped),
        **{split: [shard.to_json() for shard in shards[split]] for split in SPLITS},
    }


def _tokenizer(
    recipe: Recipe,
    corpora: Sequence[Corpus],
    thresholds: Sequence[int],
    given: Path | None,
    folder: Path,
    progress: Progress,
) -> Tokenizer:
    """The folder's tokenizer: the one that an interrupted attempt left, the given one, or one trained now."""
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.load(path)
    elif given is not None:
        tokenizer = Tokenizer.load(given)
    else:
        progress("tokenizer", 0, 1)
        tokenizer = Tokenizer.train(sample(corpora, thresholds, SAMPLE), recipe.model.vocabulary)
        progress("tokenizer", 1, 1)
    if not path.is_file():
        tokenizer.save(path)
    if tokenizer.encoder == "tiktoken" and not tokenizer.agrees(list(sample(corpora, thresholds, COMPARED))):
        return tokenizer.without_tiktoken()
    return tokenizer


def sample(corpora: Sequence[Corpus], thresholds: Sequence[int], budget: int) -> Iterator[str]:
    """Training documents of about `budget` characters together, always the same.

    They are taken from places spread evenly over each source; a compressed file is one place, read from its beginning.
    """
    skipped: Counter[str] = Counter()
    for corpus, limit in zip(corpora, thresholds, strict=True):
        left = budget // len(corpora)
        chunks = corpus.chunks()
        count = min(len(chunks), SAMPLED_CHUNKS)
        for place in range(count):
            share = left // (count - place)
            for document in read(chunks[place * len(chunks) // count], corpus.source, skipped):
                if share <= 0:
                    break
                if document_hash(document.id) >= limit:
                    text = document.text[:share]
                    share -= len(text)
                    left -= len(text)
                    yield text
