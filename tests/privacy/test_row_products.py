"""A row's product has the bits that it has alone, whoever lies beside it."""

from __future__ import annotations

import pytest
import torch

from workers.engine.privacy import row_products as module
from workers.engine.privacy.row_products import row_products


def operands(tokens: int, height: int, width: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(5)
    sizes = (tokens, height), (tokens, width)
    left, right = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return left.t(), right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(16, 96), (96, 16), (4, 96), (3, 96), (5, 7)])
@pytest.mark.parametrize("lengths", [[37], [40, 33, 9, 1], [21] * 6, [64, 64, 20]])
def test_each_row_has_the_bits_that_it_has_alone(lengths, height, width, dtype):
    left, right = operands(sum(lengths), height, width, dtype)
    found = row_products(left, right, lengths)
    assert found.shape == (len(lengths), height, width)
    rows = zip(left.split(lengths, 1), right.split(lengths), found, strict=True)
    for own_left, own_right, own in rows:
        (alone,) = row_products(own_left, own_right, [len(own_right)])
        assert torch.equal(own, alone)
        torch.testing.assert_close(alone, own_left @ own_right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_wide_types_are_multiplied_from_fresh_memory(monkeypatch, dtype):
    """Where they begin there is the same for every row; a library may add up by that."""
    seen = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: seen.append((a.storage_offset(), b.storage_offset())) or product(a, b),
    )
    row_products(*operands(70, 16, 96, dtype), [35, 35])
    row_products(*operands(70, 16, 96, dtype), [40, 30])
    assert seen == [(0, 0)] * 4


def test_a_batched_product_that_rounds_otherwise_is_left_out(monkeypatch):
    """As on a device that has other kernels for many rows than for one."""

    def backwards(left, right, rows):
        if rows < 4:
            return stacked(left, right, rows)
        length = len(right) // rows
        halves = [
            sum(a[:, part] @ b[part] for part in (slice(length // 2, None), slice(length // 2)))
            for a, b in zip(left.split(length, 1), right.split(length), strict=True)
        ]
        return torch.stack(halves)

    stacked = module._stacked
    monkeypatch.setattr(module, "_stacked", backwards)
    module._are_alike.cache_clear()
    try:
        left, right = operands(4 * 50, 16, 96, torch.bfloat16)
        found = row_products(left, right, [50] * 4)
        (alone,) = row_products(left[:, :50], right[:50], [50])
        assert torch.equal(found[0], alone)
        assert not torch.equal(backwards(left, right, 4)[0], alone)
    finally:
        module._are_alike.cache_clear()
