"""Norms are exact whatever the numbers are, and however many."""

from __future__ import annotations

import math

import pytest
import torch

from workers.engine.magnitudes import certain, l2_norm, l2_norms


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, torch.float64) for size in (1e-300, 1e-170, 1e-20, 1.0, 1e20, 1e170)),
        *((size, torch.float32) for size in (1e-30, 1e-22, 1.0, 1e20, 1e37)),
    ],
)
def test_norms_of_numbers_whose_squares_leave_the_range(size, dtype):
    vector = torch.tensor([3.0, -4.0, 0.0], dtype=dtype) * size
    nan, huge = torch.tensor([math.nan, 1.0]).double(), torch.tensor([math.inf, 1.0]).double()
    found = l2_norms([vector, torch.zeros(2).double(), nan, huge])
    assert found[:2] == [pytest.approx(5 * size, rel=10 * torch.finfo(dtype).eps), 0.0]
    assert math.isnan(found[2])
    assert found[3] == math.inf


def test_norms_of_millions_of_numbers():
    """A CPU's kernel, which adds all squares up in float32, is off by 4e-4 here."""
    vector = torch.randn(10_000_001, generator=torch.Generator().manual_seed(1))
    exact = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    assert l2_norms([vector, vector[:127]])[0] == pytest.approx(exact, rel=1e-7)
    assert float(torch.linalg.vector_norm(vector)) != pytest.approx(exact, rel=1e-5)


def test_a_norm_that_is_certain_is_not_looked_for_again():
    vector = torch.tensor([3.0, 4.0])
    assert certain(float(l2_norm(vector)), vector.fill_(7.0)) == 5.0
