"""Every way to compute several adapters' segments is the plain loop's, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.batched_products import Grouped, PaddedBmm
from workers.engine.choosing import choose_product, product_seconds
from workers.engine.products import Part, SegmentLoop

K, WIDTH = 24, 40


def parts_of(segments, dtype) -> tuple[list[Part], int]:
    """Segments as (gap before, length, rank), with gradients that already hold something."""
    generator = torch.Generator().manual_seed(1)
    parts, begin = [], 0
    for gap, length, rank in segments:
        begin += gap
        a = torch.randn(rank, K, generator=generator).to(dtype)
        b = torch.randn(WIDTH, rank, generator=generator).to(dtype)
        sums = torch.ones_like(a), torch.full_like(b, 2.0)
        parts.append(Part(begin, begin + length, a, b, 1.5, *sums))
        begin += length
    return parts, begin + segments[0][0]


def reference(inputs, parts, grad):
    """By autograd, from the formula."""
    inputs = inputs.clone().requires_grad_()
    outputs = torch.zeros(len(inputs), WIDTH, dtype=inputs.dtype)
    leaves = []
    for part in parts:
        a, b = part.a.clone().requires_grad_(), part.b.clone().requires_grad_()
        added = part.scale * (inputs[part.begin : part.end] @ a.t() @ b.t())
        outputs = torch.cat([outputs[: part.begin], added, outputs[part.end :]])
        leaves += [a, b]
    grads = torch.autograd.grad(outputs, [inputs, *leaves], grad)
    return outputs.detach(), grads[0], grads[1::2], grads[2::2]


SEGMENTS = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 3]), st.integers(1, 9), st.sampled_from([1, 4, 8, 11])),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    "product", [SegmentLoop(), PaddedBmm(), Grouped()], ids=lambda p: type(p).__name__
)
@settings(deadline=None)
@given(segments=SEGMENTS, wants=st.booleans())
def test_value_and_gradients(product, segments, wants):
    # grouped_mm has no float64.
    dtype = torch.float32 if isinstance(product, Grouped) else torch.float64
    parts, count = parts_of(segments, dtype)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, K, generator=generator).to(dtype)
    grad = torch.randn(count, WIDTH, generator=generator).to(dtype)
    expected, grad_inputs, grad_a, grad_b = reference(inputs, parts, grad)
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 1e-12, "rtol": 0}
    outputs = torch.full((count, WIDTH), 3.0, dtype=dtype)
    narrow = product.forward(inputs, parts, outputs)
    torch.testing.assert_close(outputs, expected + 3, **close)
    found = product.backward(inputs, parts, narrow, grad, wants)
    assert (found is None) is not wants
    if wants:
        torch.testing.assert_close(found, grad_inputs, **close)
    for part, a, b in zip(parts, grad_a, grad_b, strict=True):
        torch.testing.assert_close(part.grad_a, a + 1, **close)
        torch.testing.assert_close(part.grad_b, b + 2, **close)


def test_even_segments_without_gaps_take_the_short_way():
    parts, count = parts_of([(0, 5, 4)] * 3, torch.float64)
    inputs = torch.randn(count, K, dtype=torch.float64)
    for product in (PaddedBmm(), SegmentLoop()):
        outputs = torch.zeros(count, WIDTH, dtype=torch.float64)
        product.forward(inputs, parts, outputs)
        expected, *_ = reference(inputs, parts, torch.zeros(count, WIDTH, dtype=torch.float64))
        torch.testing.assert_close(outputs, expected)


def test_outputs_may_be_of_a_narrower_type():
    parts, count = parts_of([(2, 5, 4), (0, 3, 1)], torch.float32)
    inputs = torch.randn(count, K)
    expected, *_ = reference(inputs, parts, torch.zeros(count, WIDTH))
    for product in (SegmentLoop(), PaddedBmm(), Grouped()):
        outputs = torch.zeros(count, WIDTH, dtype=torch.bfloat16)
        product.forward(inputs, parts, outputs)
        torch.testing.assert_close(outputs.float(), expected, atol=0.02, rtol=0.01)


def test_choosing(base, monkeypatch):
    assert isinstance(choose_product(base), SegmentLoop)
    for product in (SegmentLoop(), PaddedBmm(), Grouped()):
        assert 0 < product_seconds(product, base, segments=3, tokens=4, rank=8) < 60

    class Lacking(SegmentLoop):
        def forward(self, inputs, parts, width):
            raise RuntimeError("no kernel for this device")

    assert product_seconds(Lacking(), base) == float("inf")
