"""The order in which a source's rows are seen: a keyed permutation, computed in O(1) and without state."""

from __future__ import annotations

import functools
import hashlib

ROUNDS = 6
_MASK = (1 << 64) - 1


@functools.lru_cache(maxsize=256)
def _round_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    keys = []
    for number in range(ROUNDS):
        digest = hashlib.sha256(f"order\0{seed}\0{source}\0{epoch}\0{number}".encode()).digest()
        keys.append(int.from_bytes(digest[:8], "little"))
    return tuple(keys)


def permute(index: int, size: int, *, seed: int, source: str, epoch: int) -> int:
    """Where `index` of `range(size)` goes in this epoch's pseudo-random permutation.

    A Feistel network over the next power of two, walked along its cycle until it is back inside (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"): fewer than two walks on average.
    """
    if size <= 2:
        # One bit cannot be split into halves.
        return index if size < 2 else index ^ (_round_keys(seed, source, epoch)[0] & 1)
    bits = (size - 1).bit_length()
    keys = _round_keys(seed, source, epoch)
    while True:
        index = _feistel(index, bits, keys)
        if index < size:
            return index


def _feistel(value: int, bits: int, keys: tuple[int, ...]) -> int:
    low_bits = bits // 2
    high_bits = bits - low_bits
    for key in keys:
        low = value & ((1 << low_bits) - 1)
        high = value >> low_bits
        # splitmix64's finaliser (Steele, Lea and Flood 2014) as the round function.
        mixed = (low + key) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
        high ^= mixed & ((1 << high_bits) - 1)
        # The halves change places, and with them their widths where the bits are odd.
        value = (low << high_bits) | high
        low_bits, high_bits = high_bits, low_bits
    return value
