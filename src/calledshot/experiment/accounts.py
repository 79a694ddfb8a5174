"""What an arm is made of and what it costs, by arithmetic: the Efficiency Misnomer's demand to show all of it at once.

Source: Dehghani et al. (2021), "The Efficiency Misnomer": parameters, FLOPs and speed contradict each other, so a
comparison by one of them alone misleads.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calledshot.recipe import Cost
from calledshot.recipe.cost import matmuls

from .matching import Cell


@dataclass(frozen=True)
class Account:
    """One arm's costs."""

    parameters: int
    non_embedding: int
    active: int
    """Parameters that take part in one token."""
    flops_per_token: int
    """Forward and backward."""
    kv_bytes_per_token: int
    kinds: Mapping[str, int]
    """Parameters by kind: `embedding` (the head with it), `attention` and `feed_forward` (experts and router with it),
    of both stacks; norms are in none."""

    def share(self, kind: str) -> float:
        """Of all parameters."""
        return self.kinds[kind] / self.parameters


def account(cost: Cost) -> Account:
    """From the project's one counter."""
    counts = cost.parameters
    kinds = {"embedding": counts.embedding + counts.head, "attention": 0, "feed_forward": 0}
    for one in matmuls(cost.shape):
        if not one.head:
            kinds["feed_forward" if "feed_forward" in one.name else "attention"] += one.stored * one.size
    return Account(
        parameters=counts.total,
        non_embedding=counts.non_embedding,
        active=counts.active,
        flops_per_token=cost.flops_per_token.total,
        kv_bytes_per_token=cost.bytes.kv_cache_per_token,
        kinds=kinds,
    )


def changed_lines(cell: Cell, baseline: Cell, lab: Path) -> int:
    """Lines that the arm changes: one a recipe key, and for a file of the user's own that the key names those that
    differ from the baseline's file, or all of it where the baseline has none."""
    own, theirs = (one.recipe.optimizer.name.partition(":")[0] for one in (cell, baseline))
    lines = len(cell.changed)
    if own.endswith(".py") and own != theirs:
        lines += differing(_lines(own, lab), _lines(theirs, lab) if theirs.endswith(".py") else [])
    return lines


def differing(a: list[str], b: list[str]) -> int:
    """Lines that a diff of two files removes and adds."""
    changed = list(difflib.unified_diff(a, b, lineterm="", n=0))[2:]  # after the names of the files
    return sum(line[0] in "+-" for line in changed)


def _lines(file: str, lab: Path) -> list[str]:
    for path in (Path(file), lab / file):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace").splitlines()
    return []
