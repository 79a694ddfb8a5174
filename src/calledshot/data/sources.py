"""From a source in the recipe to the files that it names."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import sysconfig
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from calledshot.data import hub
from calledshot.data.readers import Chunk, File, chunks, compression, format_of
from calledshot.recipe import RunError, UsageError, source_names
from calledshot.recipe.schema import Data, Source
from calledshot.rundir import atomic_write

PYTHON_EXCLUDES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library that are no part of the source `python`."""

CACHED_SIZE = 4 << 20
"""Hashes of files from this size on are remembered; smaller ones are quicker to read than to look up."""


@dataclass(frozen=True)
class Corpus:
    """A source with its name, its format and the files it stands for."""

    source: Source
    """As in the recipe, `name` and `language` filled in."""
    files: tuple[File, ...]
    """Sorted by name."""
    fingerprints: tuple[str, ...]
    """Of each file: sha256 of its content, or its blob id on the hub."""
    revision: str = ""
    """Commit on the hub."""
    skipped: tuple[tuple[str, int], ...] = ()
    """(reason, how many files) left out."""

    def chunks(self) -> list[Chunk]:
        return chunks(self.files)


def resolve(data: Data, lab: Path) -> list[Corpus]:
    """The corpora of a recipe. Relative paths are looked up in the current folder, then in the lab."""
    hashes = FileHashes(lab / "data" / "file-hashes.json")
    corpora = []
    for source, name in zip(data.sources, source_names(data), strict=True):
        named = replace(source, name=name)
        if source.path == "python":
            corpora.append(_python(named, hashes))
        elif source.path.startswith("hf:"):
            corpora.append(_hub(named))
        else:
            corpora.append(_local(named, lab, hashes))
    hashes.save()
    return corpora


def _python(source: Source, hashes: FileHashes) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    language = "python" if source.language == "und" else source.language
    files, undecodable = [], 0
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in PYTHON_EXCLUDES]
        for name in names:
            # _sysconfigdata and config-* say how this interpreter was built, and differ from machine to machine.
            if not name.endswith(".py") or name.startswith("_sysconfigdata") or "config-3" in folder:
                continue
            path = Path(folder) / name
            try:
                size = len(path.read_bytes().decode("utf-8").encode())
            except UnicodeDecodeError:
                undecodable += 1
                continue
            files.append(File(str(path), path.relative_to(root).as_posix(), size, "text"))
    skipped = (("not UTF-8", undecodable),) if undecodable else ()
    return _corpus(replace(source, language=language), files, hashes, skipped)


def _local(source: Source, lab: Path, hashes: FileHashes) -> Corpus:
    written = os.path.expanduser(source.path)
    if glob.has_magic(written) and not os.path.exists(written):
        root, paths = _glob(written, lab)
    else:
        found = _first(written, lab)
        if found is None:
            raise UsageError(f"data.sources: {source.path}: no such file or folder (nor a built-in source: `python`)")
        if found.is_dir():
            root, paths = found, [path for path in found.rglob("*") if path.is_file()]
        else:
            root, paths = found.parent, [found]
    # A link back up the tree makes every file appear many times, in training and held out alike.
    once = {os.path.realpath(path): path for path in sorted(paths, key=lambda path: len(path.parts), reverse=True)}
    files = []
    for path in once.values():
        name = path.relative_to(root).as_posix()
        if any(part.startswith(".") for part in name.split("/")) and len(paths) > 1:
            continue
        files.append(File(str(path.absolute()), name, path.stat().st_size, _format(source, name)))
    skipped = (("links to files that are here already", len(paths) - len(once)),) if len(once) < len(paths) else ()
    return _corpus(source, files, hashes, skipped)


def _first(written: str, lab: Path) -> Path | None:
    return next((path for path in (Path(written), lab / written) if path.exists()), None)


def _glob(written: str, lab: Path) -> tuple[Path, list[Path]]:
    parts = Path(written).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    for base in (Path("."), lab):
        root = base.joinpath(*parts[:fixed])
        paths = [root / name for name in glob.glob(os.path.join(*parts[fixed:]), root_dir=root, recursive=True)]
        paths = [path for path in paths if path.is_file()]
        if paths:
            return root, paths
    raise UsageError(f"data.sources: {written}: no file matches (looked in {Path.cwd()} and {lab})")


def _hub(source: Source) -> Corpus:
    wanted = hub.parse(source.path)
    listing = hub.listing(wanted)
    names = [name for name in listing.files if not wanted.pattern or fnmatch.fnmatch(name, wanted.pattern)]
    if not wanted.pattern:
        # A data set's own papers (README, scripts) are not its data.
        names = [name for name in names if _is_data(name)]
    names = [name for name in names if not _excluded(source, name)]
    if not names:
        raise UsageError(
            f"data.sources: {source.path}: no file matches; the data set holds {', '.join(sorted(listing.files)[:8])}"
        )
    files, fingerprints = [], []
    for name in sorted(names):
        path = hub.download(wanted, name, listing.revision)
        files.append(File(str(path), name, path.stat().st_size, _format(source, name)))
        fingerprints.append(listing.files[name])
    return Corpus(source, tuple(files), tuple(fingerprints), listing.revision)


def _is_data(name: str) -> bool:
    plain = name[: -len(compression(name))] if compression(name) else name
    return plain.endswith((".parquet", ".jsonl", ".ndjson", ".json", ".txt")) and not Path(name).name.startswith(".")


def _format(source: Source, name: str) -> str:
    return format_of(name) if source.format == "auto" else source.format


def _excluded(source: Source, name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in source.exclude)


def _corpus(source: Source, files: list[File], hashes: FileHashes, skipped: tuple[tuple[str, int], ...] = ()) -> Corpus:
    kept = sorted((file for file in files if not _excluded(source, file.name)), key=lambda file: file.name)
    full = [file for file in kept if file.size]
    if not kept:
        raise UsageError(f"data.sources: {source.path}: holds no file that is not hidden or excluded")
    if not full:
        raise UsageError(f"data.sources: {source.path}: empty; name a file with text in it")
    if len(full) < len(kept):
        skipped = (*skipped, ("empty file", len(kept) - len(full)))
    return Corpus(source, tuple(full), tuple(hashes.of(file) for file in full), skipped=skipped)


class FileHashes:
    """sha256 of files, remembered for large ones by size and time of change. A cache: it may be deleted at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list] = {}
        self._new = False
        with suppress(OSError, ValueError):
            self._known = json.loads(path.read_bytes())

    def of(self, file: File) -> str:
        try:
            stat = os.stat(file.path)
            stamp = [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(file.path)
            if known and known[:2] == stamp:
                return known[2]
            with open(file.path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise RunError(f"{file.path}: cannot be read ({error.strerror})") from None
        if file.size >= CACHED_SIZE:
            self._known[file.path] = [*stamp, digest]
            self._new = True
        return digest

    def save(self) -> None:
        if self._new:
            # Without it the next start is slower, and nothing else.
            with suppress(OSError, RunError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._path, json.dumps(self._known, indent=1))
