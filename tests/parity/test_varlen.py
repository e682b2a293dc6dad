"""What a GPU's ragged attention kernel is given means what the CPU's way computes.

The kernel itself has no CPU form; a plain one with its signature stands in for it here.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from parity.ragged import ragged
from torch.nn.attention import varlen

from workers.engine.bucket_attention import bucket_attention
from workers.engine.packing import pack
from workers.engine.ragged_attention import ragged_attention


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_computes_what_the_cpu_does(monkeypatch, window, groups):
    monkeypatch.setattr(varlen, "varlen_attn", ragged)
    lengths = [17, 16, 9, 1]
    packing = pack(lengths, "cpu")
    generator = torch.Generator().manual_seed(3)
    found = []
    ways = {
        ragged_attention: (packing.borders, packing.longest),
        bucket_attention: (packing.buckets,),
    }
    for way, layout in ways.items():
        generator.manual_seed(3)
        # As `transformers` brings them: heads before tokens, and not contiguous.
        leaves = [
            torch.randn(heads, sum(lengths), 8, generator=generator, dtype=torch.float64)
            .transpose(0, 1)
            .requires_grad_()
            for heads in (2 * groups, 2, 2)
        ]
        output = way(*leaves, *layout, 0.3, window)
        slope = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        found.append([output, *torch.autograd.grad(output, leaves, slope)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 5])
def test_scores_and_their_softmax_are_in_float32(window):
    """In bfloat16 they would be off by some 3e-3 of what comes out, several times as much."""
    lengths = [300, 30, 17]
    packing = pack(lengths, "cpu")
    generator = torch.Generator().manual_seed(3)
    exact = [
        torch.randn(sum(lengths), heads, 32, generator=generator).bfloat16().double()
        for heads in (6, 2, 2)
    ]
    expected = bucket_attention(*exact, packing.buckets, 1.0, window)
    found = bucket_attention(*(part.bfloat16() for part in exact), packing.buckets, 1.0, window)
    # Probabilities and output are rounded, no more.
    assert (found - expected).norm() < 2**-8 * expected.norm()


def test_one_bias_serves_documents_of_all_lengths():
    buckets = pack([700, 650, 600], "cpu").buckets
    made = [buckets.bias(bucket.length, 9, torch.float32) for bucket in buckets.members]
    assert len({bias.untyped_storage().data_ptr() for bias in made}) == 1
    for bias in made:
        place = torch.arange(len(bias))
        behind = place[:, None] - place
        assert torch.equal(bias == 0, (behind >= 0) & (behind < 9))


def test_the_kernel_has_the_arguments_that_it_is_given():
    known = inspect.signature(varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= known.keys()
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
