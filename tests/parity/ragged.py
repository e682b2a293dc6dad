"""What stands in for a GPU where there is none: its attention kernel, and how a pass runs again."""

from __future__ import annotations

from functools import partial
from weakref import WeakMethod

import pytest
import torch
from torch.nn.attention import varlen

from workers.engine import packing


def ragged(q, k, v, borders_q, borders_k, longest_q, longest_k, **options):
    """Attention document by document, as `varlen_attn` documents its arguments."""
    assert all(part.is_contiguous() for part in (q, k, v))
    assert borders_q.dtype == torch.int32
    assert torch.equal(borders_q, borders_k)
    assert longest_q == longest_k >= int(borders_q.diff().max())
    left, right = options["window_size"]
    assert right == 0
    assert options.get("enable_gqa") in (None, q.shape[1] != k.shape[1])
    # What belongs to no document is not written.
    output = torch.full((len(q), q.shape[1], v.shape[2]), torch.nan, dtype=q.dtype)
    for begin, end in zip(borders_q[:-1].tolist(), borders_q[1:].tolist(), strict=True):
        groups = q.shape[1] // k.shape[1]
        own_k, own_v = (part[begin:end].repeat_interleave(groups, 1) for part in (k, v))
        scores = torch.einsum("nhe,mhe->hnm", q[begin:end], own_k) * options["scale"]
        place = torch.arange(end - begin)
        behind = place[:, None] - place
        seen = (behind >= 0) & ((left < 0) | (behind <= left))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        output[begin:end] = torch.einsum("hnm,mhe->nhe", weights, own_v)
    return output


def _run(function):
    function()()


class Again:
    """Runs the functions themselves, once more than asked for, as a GPU's warm-up does."""

    def record(self, functions):
        for function in functions:
            function()
        # A graph does not hold what it was captured from.
        return [partial(_run, WeakMethod(function)) for function in functions]


@pytest.fixture
def ragged_kernel(monkeypatch):
    """As if this device had one for all types."""
    monkeypatch.setattr(varlen, "varlen_attn", ragged)
    monkeypatch.setattr(packing, "has_ragged_kernel", lambda device, dtype, width: True)
