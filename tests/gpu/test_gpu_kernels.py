"""A GPU's own kernels compute what the plain ones do."""

from __future__ import annotations

import pytest
import torch
from gpu.gpu_models import DEVICE, distance, middle

from workers.engine.batched_products import Grouped, PaddedBmm
from workers.engine.bucket_attention import bucket_attention
from workers.engine.choosing import choose_product
from workers.engine.compiling import compile_kernels
from workers.engine.graphs.adapters import _RowProduct, _Rows
from workers.engine.graphs.frames import Frame
from workers.engine.graphs.tapes import CudaTape
from workers.engine.kernels import KERNELS
from workers.engine.packing import pack
from workers.engine.products import Part, SegmentLoop
from workers.engine.ragged_attention import ragged_attention


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 2, 32), (4, 4, 64), (3, 1, 256)])
def test_ragged_attention(window, heads, groups, width):
    lengths = [200, 65, 64, 17, 1, 1]
    packing = pack(lengths, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(3)
    shapes = [(count, sum(lengths), width) for count in (heads, groups, groups)]
    leaves = [torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes]
    slope = torch.randn(sum(lengths), heads, width, generator=generator, device=DEVICE)
    found = []
    ways = (
        (ragged_attention, (packing.borders, packing.longest), torch.bfloat16),
        (bucket_attention, (packing.buckets,), torch.float32),
    )
    for way, layout, dtype in ways:
        own = [leaf.to(torch.bfloat16).to(dtype).transpose(0, 1) for leaf in leaves]
        own = [leaf.detach().requires_grad_() for leaf in own]
        output = way(*own, *layout, width**-0.5, window)
        found.append([output, *torch.autograd.grad(output, own, slope.to(dtype))])
    for ours, theirs in zip(*found, strict=True):
        # A window of one token has no slope by queries and keys.
        assert (ours - theirs).norm() < 1e-2 * theirs.norm() + 1e-3


K, WIDTH = 96, 160
LENGTHS = [1, 33, 7, 64, 15]


def parts_of(ranks: list[int]) -> list[Part]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    options = {"generator": generator, "device": DEVICE}
    parts, begin = [], 0
    for length, rank in zip(LENGTHS, ranks, strict=True):
        a = torch.randn(rank, K, **options).bfloat16()
        b = torch.randn(WIDTH, rank, **options).bfloat16()
        sums = torch.ones(a.shape, device=DEVICE), torch.ones(b.shape, device=DEVICE)
        parts.append(Part(begin, begin + length, a, b, 1.5, *sums))
        begin += length
    return parts


@pytest.mark.parametrize("product", [PaddedBmm(), Grouped()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("ranks", [[8, 8, 8, 8, 8], [1, 64, 16, 3, 24]])
def test_products_of_ragged_segments(product, ranks):
    generator = torch.Generator(DEVICE).manual_seed(2)
    inputs = torch.randn(sum(LENGTHS), K, generator=generator, device=DEVICE).bfloat16()
    grad = torch.randn(sum(LENGTHS), WIDTH, generator=generator, device=DEVICE).bfloat16()
    found = []
    for way in (product, SegmentLoop()):
        parts = parts_of(ranks)
        outputs = torch.ones(len(inputs), WIDTH, device=DEVICE, dtype=torch.bfloat16)
        narrow = way.forward(inputs, parts, outputs)
        back = way.backward(inputs, parts, narrow, grad, True)
        found.append([outputs, back, *(p.grad_a for p in parts), *(p.grad_b for p in parts)])
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs) < 1e-2


def test_rows_of_a_frame_with_some_unused():
    """Five segments in a frame for eight, then tokens that are only padding."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    count, padded = sum(LENGTHS), sum(LENGTHS) + 8
    inputs = torch.randn(padded, K, generator=generator, device=DEVICE).bfloat16()
    grad = torch.randn(padded, WIDTH, generator=generator, device=DEVICE).bfloat16()
    grad[count:] = 0
    parts = parts_of([16] * 5)
    frame = Frame(
        {"x.q": torch.nn.Linear(K, WIDTH, device="meta")}, ["q"], 16, 8, DEVICE, torch.bfloat16
    )
    a_SrK, b_SOr = frame.weights["x.q"]
    for row, part in enumerate(parts):
        a_SrK[row], b_SOr[row] = part.a, part.b * part.scale
    ends = torch.tensor([*(p.end for p in parts), count, count, padded], dtype=torch.int32)
    sums = frame.gradients["x.q"]
    rows = _Rows(0, padded, a_SrK, b_SOr, 1.0, *sums, ends.to(DEVICE))
    outputs = torch.ones(padded, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    way = _RowProduct()
    narrow = way.forward(inputs, [rows], outputs)
    back = way.backward(inputs, [rows], narrow, grad, True)
    expected = torch.ones(count, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    loop = SegmentLoop()
    low = loop.forward(inputs[:count], parts, expected)
    theirs = loop.backward(inputs[:count], parts, low, grad[:count], True)
    assert distance(outputs[:count], expected) < 1e-2
    assert distance(back[:count], theirs) < 1e-2
    for row, part in enumerate(parts):
        assert distance(sums[0][row], part.grad_a - 1) < 1e-2
        # A part's gradient of B is by B, a row's by s·B.
        assert distance(sums[1][row] * part.scale, part.grad_b - 1) < 1e-2


def test_a_capture_that_fails_leaves_the_device_as_it_was():
    sums = torch.zeros(4, device=DEVICE)
    with pytest.raises(RuntimeError):
        CudaTape(DEVICE).record([lambda: sums.sum().item()])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    large = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < torch.cuda.memory_allocated() + 2**28
    (again,) = CudaTape(DEVICE).record([lambda: sums.add_(1)])
    before = sums.clone()
    again()
    assert torch.equal(sums, before + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_capture_is_of_the_device_that_it_is_told():
    sums = torch.zeros(4, device="cuda:1")
    (again,) = CudaTape("cuda:1").record([lambda: sums.add_(1)])
    before = sums.clone()
    again()
    assert torch.equal(sums, before + 1)


def test_the_product_is_chosen_by_measurement():
    assert isinstance(choose_product(middle()), Grouped | PaddedBmm)


def test_compiled_kernels_compute_the_same():
    try:
        compile_kernels(DEVICE, torch.bfloat16)
        for each in KERNELS:
            if each.is_fused:
                for sample in each.samples(torch.device(DEVICE), torch.bfloat16):
                    found, expected = each._fused(*sample), each.plain(*sample)
                    pairs = zip(found, expected, strict=True)
                    for ours, theirs in pairs if isinstance(found, tuple) else [(found, expected)]:
                        assert distance(ours, theirs) < 1e-2
    finally:
        for each in KERNELS:
            each.adopt(None)
