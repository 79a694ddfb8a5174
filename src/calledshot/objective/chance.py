"""Chance that depends on a key and a place alone: the same on every machine, with every numpy, in any order."""

from __future__ import annotations

import hashlib

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: object) -> int:
    """64 bits that depend on all of the parts."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "little")


def words(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """uint64 of the arrays' common shape: the number at each place of the sequence that each key begins.

    splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), entered at any place.
    """
    mixed = keys.astype(np.uint64) + (places.astype(np.uint64) + np.uint64(1)) * _STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def uniform(numbers: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from `words`."""
    return (numbers >> np.uint64(11)) * 2.0**-53
