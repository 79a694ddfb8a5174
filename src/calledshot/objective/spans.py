"""Which tokens span corruption takes out (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified
Text-to-Text Transformer"), for many pieces of text at once.

Arrays are (P,), one entry a piece, or (N,), one entry a token of all pieces one after another.
"""

from __future__ import annotations

import numpy as np


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`counts[0]` numbers from `starts[0]` up, then `counts[1]` from `starts[1]` up, and so on."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def span_counts(lengths: np.ndarray, rates: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens taken out, spans that they form), int64 (P,), of pieces of so many tokens.

    T5's numbers: round(length * rate) tokens, at least 1 and at most all but 1, in round(tokens / mean) spans, at least
    1; halves round to even. A piece of 1 token, which T5 leaves whole, is taken out whole, so that it has something to
    predict. There are no more spans than tokens left between them, where T5's code would make them run together.
    """
    taken = np.clip(np.rint(lengths * rates).astype(np.int64), 1, np.maximum(lengths - 1, 1))
    spans = np.clip(np.rint(taken / means).astype(np.int64), 1, np.maximum(lengths - taken, 1))
    some = lengths > 0
    return np.where(some, taken, 0), np.where(some, spans, 0)


def span_mask(lengths: np.ndarray, taken: np.ndarray, spans: np.ndarray, words: np.ndarray) -> np.ndarray:
    """bool (N,): the tokens taken out, given `span_counts` and a random word (uint64) for each token.

    The lengths of the spans are a random composition of their sum, all equally likely, and so are those of the
    stretches between them. They take turns and begin with a stretch that stays, so that the first token of a piece
    stays and its last one is taken out.
    """
    pieces = np.repeat(np.arange(len(lengths)), 2)
    # A piece's tokens in two groups, those that stay and those that go, each to be cut into as many parts.
    sizes = np.stack([lengths - taken, taken], axis=1).ravel()
    parts = np.minimum(spans[pieces], sizes)
    firsts = np.cumsum(sizes) - sizes
    group = np.repeat(np.arange(len(sizes)), sizes)
    low = words >> np.uint64(24)
    low[firsts[sizes > 0]] = 0
    # A group's first token and those of its lowest words begin a part.
    order = np.argsort((group.astype(np.uint64) << np.uint64(40)) | low, kind="stable")
    begins = np.zeros(len(words), bool)
    begins[order[ranges(firsts, parts)]] = True
    starts = np.flatnonzero(begins)
    slot = 2 * np.repeat((np.cumsum(spans) - spans)[pieces], parts) + 2 * ranges(np.zeros_like(parts), parts)
    lengths_in_turn = np.zeros(2 * int(spans.sum()), np.int64)
    lengths_in_turn[slot + np.repeat(np.arange(len(sizes)) % 2, parts)] = np.diff(starts, append=len(words))
    return np.repeat(np.arange(len(lengths_in_turn)) % 2 == 1, lengths_in_turn)


def roll(mask: np.ndarray, lengths: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The mask (N,) with each piece's part rotated by `turns` (P,) to the right, 0 <= turns < lengths."""
    firsts = np.cumsum(lengths) - lengths
    within = ranges(np.zeros_like(lengths), lengths)
    size = np.repeat(lengths, lengths)
    turned = np.empty_like(mask)
    turned[np.repeat(firsts, lengths) + (within + np.repeat(turns, lengths)) % np.maximum(size, 1)] = mask
    return turned
