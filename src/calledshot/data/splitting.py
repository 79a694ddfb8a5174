"""Which documents are held out: whole ones, by a hash of their ids."""

from __future__ import annotations

import hashlib
from collections import Counter

from calledshot.data.readers import read
from calledshot.data.sources import Corpus
from calledshot.recipe import UsageError

SALT = b"calledshot held-out 1\0"


def document_hash(name: str) -> int:
    """64 bits that depend on a document's id alone: not on the source, its place in it, the seed or the machine."""
    return int.from_bytes(hashlib.sha256(SALT + name.encode("utf-8", "replace")).digest()[:8], "big")


def threshold(corpus: Corpus, share: float) -> int:
    """Documents whose hash is below this are held out.

    That is `share` of them in the long run. A source of two documents or more always has one held out and one to train
    on: where chance would leave none, the one with the smallest or the largest hash. A single document is trained on.
    Reading stops once both kinds were seen, so that only small sources are read whole. UsageError where there are
    several and all have one id: they would be held out, or trained on, together.
    """
    limit = int(share * 2**64)
    hashes: list[int] = []
    name = ""
    skipped: Counter[str] = Counter()
    for chunk in corpus.chunks():
        for document in read(chunk, corpus.source, skipped):
            name = document.id
            hashes.append(document_hash(name))
            if min(hashes[0], hashes[-1]) < limit <= max(hashes[0], hashes[-1]):
                return limit
    if len(hashes) < 2:
        return 0
    if min(hashes) == max(hashes):
        raise UsageError(
            f"data.sources: {corpus.source.path}: all {len(hashes):,} documents have the id {name[:80]!r}, so none "
            'could be held out from the others; set the source\'s `id_field` to one that tells them apart, or to ""'
        )
    return min(hashes) + 1 if min(hashes) >= limit else max(hashes)
