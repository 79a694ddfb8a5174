"""What `xz -9e` makes of the held-out documents: the bar that a language model of so many bytes has to clear."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from calledshot.data import Prepared
from calledshot.data.shards import Shard
from calledshot.recipe import UsageError
from calledshot.rundir import read_json, write_json

ALONE, GIVEN = "xz -9e", "xz -9e given the training text"
TRAINING_BYTES = 64 << 20
"""Most bytes of training text, from its end, that xz is given: it reads about a megabyte a second."""

LARGEST_WINDOW = 1 << 28
"""Window for which lzma takes some 3 GB of memory."""

Progress = Callable[[str, int, int], None]


def compressors(prepared: Prepared, source: str, progress: Progress | None = None) -> dict[str, float]:
    """Bits per byte by compressor of all held-out documents of a source, one after the other.

    `xz -9e` alone, and what it adds when it has read the training text before, through a window that holds all of it.
    Minutes for large corpora, so the answer is kept in the prepared folder. UsageError where the source holds nothing
    out, or where its tokenizer does not give the bytes back.
    """
    shards = prepared.source(source)
    if not shards.held_out.documents:
        raise UsageError(f"{source}: holds no documents out, so there is nothing to compress")
    position = [one.name for one in prepared.sources].index(source)
    file = prepared.path / "compressors" / f"{position}-{prepared.digest[:12]}.json"
    known = read_json(file)
    if known is not None:
        return known["bits_per_byte"]
    if progress:
        progress(f"xz -9e of {source}", 0, 1)
    held_out = b"".join(_text(prepared, shard) for shard in shards.held_out.shards)
    if len(held_out) != shards.held_out.bytes:
        raise UsageError(f"{source}: its tokenizer does not give texts back byte by byte, so xz has nothing to read")
    training = b""
    for shard in reversed(shards.train.shards):
        training = _text(prepared, shard) + training
        if len(training) >= TRAINING_BYTES:
            break
    training = training[-TRAINING_BYTES:]
    with ThreadPoolExecutor(2) as pool:
        # The longest first; `lzma` leaves Python's lock.
        both, before, alone = pool.map(_compressed, (training + held_out, training, held_out))
    bits = {ALONE: 8 * alone / len(held_out), GIVEN: 8 * (both - before) / len(held_out)}
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"bits_per_byte": bits, "held_out_bytes": len(held_out), "training_bytes": len(training)})
    if progress:
        progress(f"xz -9e of {source}", 1, 1)
    return bits


def _text(prepared: Prepared, shard: Shard) -> bytes:
    """The documents' texts, without their begin and end."""
    ids = np.fromfile(prepared.path / f"{shard.stem}.bin", prepared.dtype)
    tokenizer = prepared.tokenizer
    return tokenizer.decode_bytes(ids[(ids != tokenizer.begin) & (ids != tokenizer.end)])


def _compressed(text: bytes) -> int:
    """Bytes that `xz -9e` makes of a text, with a window that holds all of it."""
    window = min(max(1 << len(text).bit_length(), 1 << 16), LARGEST_WINDOW)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(text, lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=filters))
