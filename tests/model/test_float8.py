from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from calledshot.model.float8 import float8_linear, quantize


def test_the_largest_entry_becomes_the_largest_number_of_the_type() -> None:
    x = torch.tensor([0.5, -3.0, 1e-4, 0.0])
    for dtype, largest in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        narrow, inverse = quantize(x, dtype)
        assert narrow.float().abs().max() == largest
        assert narrow.float()[1] * inverse == pytest.approx(-3.0)
        assert narrow.float()[0] * inverse == pytest.approx(0.5, rel=2**-3)
    assert quantize(torch.zeros(4), torch.float8_e4m3fn)[0].float().tolist() == [0.0] * 4


def test_products_and_gradients_are_those_of_a_linear_layer_up_to_the_types_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, 64, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(48, 64, generator=generator) * 30).bfloat16().requires_grad_()
    slope = (torch.randn(3, 32, 48, generator=generator) * 1e-4).bfloat16()
    found = torch.autograd.grad(float8_linear(x, weight), (x, weight), slope)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), slope)
    y, exact = float8_linear(x, weight).float(), F.linear(x, weight).float()
    # e4m3 rounds to 2^-4 at worst and e5m2 to 2^-3; over a sum of many products most of it averages out.
    assert (y - exact).norm() / exact.norm() < 0.05
    for mine, theirs in zip(found, expected, strict=True):
        assert 0 < (mine - theirs).float().norm() / theirs.float().norm() < 0.1


def test_sizes_that_the_kernels_do_not_take_are_multiplied_as_ever() -> None:
    x, weight = torch.randn(5, 64), torch.randn(48, 64)
    assert torch.equal(float8_linear(x, weight), F.linear(x, weight))
