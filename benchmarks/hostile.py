"""Checkpoints that somebody has prepared to be opened: each must be refused in one line, and nothing in it carried out.

Whoever can write a checkpoint can make its hashes right, too, so they are right here wherever that helps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from processes import Shot, gang, shot, stop_at


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@dataclass(frozen=True)
class Attempt:
    """One attack and what came of it."""

    what: str
    code: int
    said: str
    """The one line; else all that it said."""
    carried_out: bool
    went_on: bool
    """Whether it trained."""
    harmless: bool
    """Whether what was attacked decides nothing, so that training on is right."""

    @property
    def refused(self) -> bool:
        if self.carried_out:
            return False
        if self.harmless:
            return self.code == 0
        return self.code in (1, 2) and not self.went_on and self.said.startswith("shot: ") and "\n" not in self.said


def attempts(lab: Path, overrides: tuple[str, ...], wanted: Callable[[str], bool] = lambda what: True) -> list[Attempt]:
    """Attacks on the only checkpoint of a run of one rank, and on that of one of two."""
    command = ("train", "tiny.toml", *overrides, "checkpoint.every_minutes=0", "checkpoint.every_steps=0")
    stopping = functools.partial(stop_at, 9)
    alone = shot(lab, *command, "--name", "alone", before=stopping)
    pair = gang(lab, 2, *command, "--name", "pair", "parallel.shard=2", before=stopping)
    assert [alone.code, *(one.code for one in pair)] == [143] * 3, (alone.said, pair)
    found = []
    for run in ("alone", "pair"):
        for what, attack in attacks(lab, only(lab / "runs" / run)).items():
            if wanted(what):
                found.append(attempt(lab, run, f"{what}{', 2 ranks' if run == 'pair' else ''}", attack, command))
    return found


def attempt(lab: Path, origin: str, what: str, attack: Callable[[Path], None], command: tuple[str, ...]) -> Attempt:
    """Goes on with a copy of a run whose checkpoint was attacked."""
    run, mark = lab / "runs" / "attacked", lab / "mark"
    shutil.copytree(lab / "runs" / origin, run)
    attack(only(run))
    rows = (run / "metrics.jsonl").stat().st_size
    ended = Shot(lab, *command, "--name", run.name).end()
    lines = [line for line in ended.said.splitlines() if line.strip()]
    went_on = (run / "metrics.jsonl").stat().st_size > rows
    carried_out = mark.exists()
    shutil.rmtree(run)
    shutil.rmtree(mark, ignore_errors=True)
    return Attempt(what, ended.code, "\n".join(lines), carried_out, went_on, what.startswith(("latest", "verified")))


def only(run: Path) -> Path:
    """The folder of a run's only checkpoint."""
    (folder,) = (run / "checkpoints").glob("step-*")
    return folder


def attacks(lab: Path, folder: Path) -> dict[str, Callable[[Path], None]]:
    """Attacks on a checkpoint like the one in `folder`, by what they do."""
    mark, outside = lab / "mark", lab / "outside"
    outside.write_bytes(b"not of the checkpoint")
    payload = pickle.dumps(Payload(mark))
    found: dict[str, Callable[[Path], None]] = {}
    for file in sorted(folder.iterdir()):
        found[f"{file.name}: a pickle"] = functools.partial(replace, name=file.name, content=payload)
        if file.suffix == ".json":
            found[f"{file.name}: brackets 100,000 deep"] = functools.partial(
                replace, name=file.name, content=b"[" * 100_000
            )
        if file.suffix == ".safetensors":
            found[f"{file.name}: an archive of torch.save"] = functools.partial(
                replace, name=file.name, content=archive(payload)
            )
            found[f"{file.name}: a pickle after the tensors"] = functools.partial(
                replace, name=file.name, content=file.read_bytes() + payload
            )
            found[f"{file.name}: tensors of other places in the header"] = functools.partial(
                replace, name=file.name, content=shifted(file.read_bytes())
            )
    found["latest: a pickle"] = lambda path: (path.parent / "latest").write_bytes(payload) and None
    for name in ("../outside", "../../../../outside", str(outside)):
        shown = name if name.startswith("..") else "an absolute path"
        found[f"latest: {shown}"] = lambda path, name=name: (path.parent / "latest").write_text(f"{name}\n") and None
        found[f"manifest.json: {shown}"] = functools.partial(list_file, name=name, content=outside.read_bytes())
    if (folder / "pieces.json").exists():
        for name, value in {
            "a path for a file": "../../../../outside", "a number below 0": -1, "a file too many": 7, "a list": [0],
        }.items():  # fmt: skip
            found[f"pieces.json: {name}"] = functools.partial(repoint, value=value)
        found["pieces.json: a path for a tensor"] = rename_tensor
        found["pieces.json: 10^12 elements"] = functools.partial(enlarge, size=10**12)
    return found


def replace(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file, and its hash in the manifest."""
    (folder / name).write_bytes(content)
    if name not in ("manifest.json", "verified.json"):
        list_file(folder, name, content)


def list_file(folder: Path, name: str, content: bytes) -> None:
    """Enters a file in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes `pieces.json`."""
    pieces = json.loads((folder / "pieces.json").read_bytes())
    change(pieces["model"])
    replace(folder, "pieces.json", json.dumps(pieces).encode())


def repoint(folder: Path, value: Any) -> None:
    """Another file for the first piece of every tensor."""

    def change(tensors: dict[str, Any]) -> None:
        for entry in tensors.values():
            entry["pieces"][0]["file"] = value

    _edit(folder, change)


def rename_tensor(folder: Path) -> None:
    """A tensor more, with a path for a name."""
    _edit(folder, lambda tensors: tensors.update({"../../../../outside": next(iter(tensors.values()))}))


def enlarge(folder: Path, size: int) -> None:
    """A tensor that says it is too large for any memory."""

    def change(tensors: dict[str, Any]) -> None:
        entry = next(iter(tensors.values()))
        entry["shape"] = [size]
        piece = entry["pieces"][0]
        entry["pieces"] = [{**piece, "axis": None, "part": 0, "parts": 1, "start": 0, "stop": size}]

    _edit(folder, change)


def archive(payload: bytes) -> bytes:
    """What torch.load would unpickle."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3\n")
    return content.getvalue()


def shifted(content: bytes) -> bytes:
    """A safetensors file of which one tensor claims the bytes of another, and beyond the end."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    start, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [start + 2**40, end + 2**40]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
