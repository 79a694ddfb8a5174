"""Data sets and tokenizers on the Hugging Face hub, or on any server that HF_ENDPOINT names."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from calledshot.recipe import RunError, UsageError

MODEL_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
"""What a model is read from; repositories hold it in other formats too."""


@dataclass(frozen=True)
class Wanted:
    """`hf:OWNER/NAME[@REVISION][/GLOB]`, taken apart. A revision with slashes is written with %2F."""

    repository: str
    revision: str | None
    pattern: str


@dataclass(frozen=True)
class Listing:
    """A data set at one commit."""

    revision: str
    files: dict[str, str]
    """Blob id by path."""


def parse(reference: str) -> Wanted:
    """Take `hf:OWNER/NAME[@REVISION][/GLOB]` apart."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", reference)
    if not match:
        raise UsageError(f"{reference}: write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/GLOB")
    repository, revision, pattern = match.groups()
    return Wanted(repository, revision.replace("%2F", "/") if revision else None, pattern or "")


def listing(wanted: Wanted) -> Listing:
    """Ask the hub which files the data set holds, and at which commit."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(wanted.repository, revision=wanted.revision, files_metadata=True)
    except Exception as error:  # the client's own errors and those of its HTTP library
        raise _failure(f"hf:{wanted.repository}", error) from None
    files = {sibling.rfilename: sibling.blob_id or "" for sibling in info.siblings or ()}
    return Listing(info.sha or "", files)


def download(wanted: Wanted, name: str, revision: str) -> Path:
    """Bring one file of a data set into the hub's cache; a download that was cut short continues."""
    return _download(wanted.repository, name, revision, "dataset")


def download_tokenizer(reference: str) -> Path:
    """The `tokenizer.json` of `hf:OWNER/NAME[@REVISION]`."""
    wanted = parse(reference)
    return _download(wanted.repository, wanted.pattern or "tokenizer.json", wanted.revision, "model")


def download_model(reference: str) -> tuple[Path, str]:
    """The folder of `hf:OWNER/NAME[@REVISION]` with its configuration, tokenizer and safetensors, and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    wanted = parse(reference)
    if wanted.pattern:
        raise UsageError(f"{reference}: a model is a whole repository; leave out /{wanted.pattern}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(wanted.repository, revision=wanted.revision, allow_patterns=MODEL_FILES)
    except Exception as error:
        raise _failure(f"hf:{wanted.repository}", error) from None
    return Path(folder), Path(folder).name


def _download(repository: str, name: str, revision: str | None, kind: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(hf_hub_download(repository, name, revision=revision, repo_type=kind))
    except Exception as error:
        raise _failure(f"hf:{repository}/{name}", error) from None


def _failure(what: str, error: Exception) -> UsageError | RunError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return UsageError(f"{what}: access must be asked for on its page; then `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{what}: no such revision")
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(f"{what}: not on the hub, or private (`hf auth login`)")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return UsageError(f"{what}: no such file there")
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return RunError(
        f"{what}: the hub cannot be reached ({reason}); check the network and HF_ENDPOINT, then repeat the command"
    )
