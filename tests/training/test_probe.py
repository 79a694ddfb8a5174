"""What a first start finds out about its machine, also where that does other work besides."""

from __future__ import annotations

import itertools

import pytest
import torch

from calledshot.training import probe


@pytest.mark.parametrize(
    ("wide", "narrow", "taken"),
    [
        ([0.020] * 9, [0.010] * 9, "bfloat16"),
        ([0.010] * 9, [0.010] * 9, "float32"),
        # A neighbour comes after the first pairs and halves everything, or falls on single matmuls.
        ([0.020] * 3 + [0.040] * 6, [0.010] * 3 + [0.020] * 6, "bfloat16"),
        ([0.020] * 9, [0.010, 0.030, 0.010, 0.010, 0.040, 0.010, 0.010, 0.030, 0.010], "bfloat16"),
        ([0.010, 0.030, 0.010, 0.010, 0.040, 0.010, 0.010, 0.030, 0.010], [0.010] * 9, "float32"),
    ],
)
def test_the_type_of_the_matmuls_is_not_decided_by_a_neighbour(monkeypatch, wide, narrow, taken):
    timings = itertools.chain(*zip(wide, narrow, strict=True))
    monkeypatch.setattr(probe, "_seconds", lambda work: next(timings))
    assert probe._dtype(torch.device("cpu")) == taken
