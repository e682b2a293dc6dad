"""Dropout masks: a function of what they are for, and fair."""

from __future__ import annotations

import pytest
import torch

from workers.engine.dropout import CounterDropout, DropoutScope, keep_mask, token_keys
from workers.engine.randomness import derive, mix32, uniform

PINNED = [[1, 0, 0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1, 1]]


def masked(rows: list[int], length: int, *, seed=1, operation=1, module="a", features=32, p=0.3):
    scope = DropoutScope(token_keys(seed, operation, torch.tensor(rows, dtype=torch.int32), length))
    dropout = CounterDropout(p, module, scope)
    return dropout(torch.ones(len(rows), length, features))


def test_padding_order_and_split_change_no_mask():
    whole = masked([0, 1, 2], 50)
    torch.testing.assert_close(masked([2], 20)[0], whole[2, :20])
    torch.testing.assert_close(masked([1, 0], 64)[:, :50], whole[[1, 0]])


@pytest.mark.parametrize("change", [{"seed": 2}, {"operation": 2}, {"module": "b"}])
def test_every_coordinate_counts(change):
    same = (masked([0], 50) == masked([0], 50, **change)).float().mean().item()
    # Two independent masks agree with probability 0.7² + 0.3².
    assert same == pytest.approx(0.58, abs=0.06)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_scale_and_independence(p):
    outputs = masked([0, 1, 2, 3], 256, features=256, p=p)
    kept = (outputs != 0).float()
    assert kept.mean().item() == pytest.approx(1 - p, abs=0.005)
    assert outputs[outputs != 0].unique().item() == pytest.approx(1 / (1 - p))
    flat = kept.reshape(-1, 256) - (1 - p)
    variance = p * (1 - p)
    neighbours = [
        (flat[1:] * flat[:-1]).mean(),
        (flat[:, 1:] * flat[:, :-1]).mean(),
        (flat[256:] * flat[:-256]).mean(),
    ]
    # 5 standard errors of a mean of 2^18 independent products.
    assert all(abs(value.item()) < 5 * variance / 2**9 for value in neighbours)
    columns = kept.reshape(-1, 256).mean(0)
    assert (columns - (1 - p)).abs().max() < 5 * (variance / 1024) ** 0.5


@pytest.mark.parametrize("p", [1 - 1e-12, 1 - 2**-53])
def test_p_just_below_one_drops_everything(p):
    assert not masked([0, 1], 64, p=p).any()


def test_the_largest_p_that_keeps_anything_still_keeps_its_share():
    outputs = masked([0, 1, 2, 3], 256, features=256, p=1 - 2**-10)
    assert outputs.mean().item() == pytest.approx(1, abs=0.35)


def test_gradient_goes_where_the_input_went():
    scope = DropoutScope(token_keys(1, 1, torch.zeros(1, dtype=torch.int32), 8))
    inputs = torch.randn(1, 8, 16, requires_grad=True)
    output = CounterDropout(0.4, "a", scope)(inputs)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad * inputs.detach(), output.detach())
    assert (inputs.grad == 0).any()


def test_outside_a_scope_it_is_the_identity():
    inputs = torch.randn(2, 3)
    assert CounterDropout(0.5, "a", DropoutScope())(inputs) is inputs


def test_mix32_is_a_bijection_and_masks_are_pinned():
    keys = torch.arange(-(2**16), 2**16, dtype=torch.int32)
    assert len(mix32(keys).unique()) == len(keys)
    # MurmurHash3's finaliser of 1 is 0x514e28b7.
    assert mix32(torch.tensor(1, dtype=torch.int32)).item() == 0x514E28B7
    # Restored runs need the same masks from every version of this code.
    assert keep_mask(mix32(keys[:2]), 8, 0.5).int().tolist() == PINNED


def test_derived_keys_tell_their_parts_apart():
    keys = {
        derive(1),
        derive(1, 2),
        derive(12),
        derive(1, "2"),
        derive(1, "a", "b"),
        derive(1, "ab"),
    }
    assert len(keys) == 6
    draws = [uniform(7, i) for i in range(4000)]
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert sum(draws) / 4000 == pytest.approx(0.5, abs=0.03)
