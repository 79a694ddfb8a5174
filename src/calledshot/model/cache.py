"""What a decoder keeps of the tokens that it has read.

Shapes, as suffixes: B batch, S source length, K key/value heads, C head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cache:
    """Keys and values of what was read so far: per layer (B, K, S, C). A row holds positions 0, 1, 2, ... in order.

    What lies behind a row's last written position is never seen, since a query sees positions up to its own.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cross_keys: list[Tensor]
    """Of what the encoder gave, (B, K, S, C); empty where there is no encoder."""
    cross_values: list[Tensor]
    cross_bias_B1S: Tensor | None = None
    """float32: 0 where the encoder gave something, -inf elsewhere."""

    @property
    def rows(self) -> int:
        return self.keys[0].size(0)

    @property
    def capacity(self) -> int:
        return self.keys[0].size(2)

    @property
    def encoded(self) -> int:
        """Positions that the encoder's output may take."""
        return self.cross_keys[0].size(2) if self.cross_keys else 0

    def part(self, rows: slice, capacity: int) -> Cache:
        """A view of some rows, up to `capacity` positions of each."""
        keys, values = ([each[rows, :, :capacity] for each in layers] for layers in (self.keys, self.values))
        cross_keys, cross_values = ([each[rows] for each in layers] for layers in (self.cross_keys, self.cross_values))
        bias_B1S = None if self.cross_bias_B1S is None else self.cross_bias_B1S[rows]
        return Cache(keys, values, cross_keys, cross_values, bias_B1S)

    def copy_from(self, other: Cache) -> None:
        """Take over what `other` holds, as far as both reach."""
        mine, theirs = self._all(), other._all()
        for to, source in zip(mine, theirs, strict=True):
            rows, reach = min(len(to), len(source)), min(to.size(2), source.size(2))
            to[:rows, :, :reach] = source[:rows, :, :reach]

    def _all(self) -> list[Tensor]:
        bias = [] if self.cross_bias_B1S is None else [self.cross_bias_B1S]
        return [*self.keys, *self.values, *self.cross_keys, *self.cross_values, *bias]
