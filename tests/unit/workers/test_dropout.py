"""Dropout masks: a function of what they are for, and fair."""

from __future__ import annotations

import pytest
import torch

from workers.engine.dropout import (
    _keep_bits,
    keep_bits,
    kept_share,
    last_dropped,
    masked,
    module_key,
    operation_key,
    pass_dropout,
)
from workers.engine.randomness import derive, mix32, uniform

PINNED = [[1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 1]]


def drop(rows: list[int], length: int, *, seed=1, operation=1, module="a", features=32, p=0.3):
    """[R, T, F]: ones through the dropout of rows of equal length, laid end to end."""
    index = torch.tensor(rows, dtype=torch.int32).repeat_interleave(length)
    places = torch.arange(length, dtype=torch.int32).repeat(len(rows))
    numbers = torch.zeros(4, len(places), dtype=torch.int64)
    numbers[0], numbers[1] = places, index
    numbers[2], numbers[3] = operation_key(seed, operation), last_dropped(p)
    bits = pass_dropout(numbers).mask(module_key(module), features)
    kept = masked(torch.ones(len(places), features), bits) / kept_share(p)
    return kept.view(len(rows), length, features)


def test_length_order_and_split_change_no_mask():
    whole = drop([0, 1, 2], 50)
    torch.testing.assert_close(drop([2], 20)[0], whole[2, :20])
    torch.testing.assert_close(drop([1, 0], 64)[:, :50], whole[[1, 0]])


@pytest.mark.parametrize("change", [{"seed": 2}, {"operation": 2}, {"module": "b"}])
def test_every_coordinate_counts(change):
    same = (drop([0], 50) == drop([0], 50, **change)).float().mean().item()
    # Two independent masks agree with probability 0.7² + 0.3².
    assert same == pytest.approx(0.58, abs=0.06)


@pytest.mark.parametrize(
    ("tokens", "twice", "keeps"), [(9, True, 1), (9, False, 0), (999, True, 0)]
)
def test_a_mask_that_is_kept_is_the_one_that_is_drawn(tokens, twice, keeps):
    numbers = torch.arange(4 * tokens).view(4, tokens)
    numbers[3] = last_dropped(0.5)
    dropout = pass_dropout(numbers, twice=twice)
    key = module_key("a")
    first = dropout.mask(key, 32)
    assert len(dropout._kept) == keeps
    again, once_more = dropout.mask(key, 32), dropout.mask(key, 32)
    assert (again is first) == bool(keeps)
    assert torch.equal(again, first)
    assert torch.equal(once_more, first)
    assert not torch.equal(dropout.mask(module_key("b"), 32), first)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_share_scale_and_independence(p):
    outputs = drop([0, 1, 2, 3], 256, features=256, p=p)
    kept = (outputs != 0).float()
    assert kept.mean().item() == pytest.approx(1 - p, abs=0.005)
    assert outputs[outputs != 0].unique().item() == pytest.approx(1 / kept_share(p))
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


@pytest.mark.parametrize("p", [1 - 1e-12, 1 - 2**-53, 1e-12, 5e-324])
def test_the_least_share_is_one_draw_and_the_scale_knows_it(p):
    share = kept_share(p)
    assert share == (2**-15 if p > 0.5 else 1 - 2**-15)
    outputs = drop(list(range(16)), 256, features=512, p=p)
    assert outputs.mean().item() == pytest.approx(1, abs=0.3)
    assert 0 < (outputs != 0).float().mean().item() < 1
    assert kept_share(0.0) == 1


def test_the_largest_p_that_keeps_anything_still_keeps_its_share():
    outputs = drop([0, 1, 2, 3], 256, features=256, p=1 - 2**-10)
    assert outputs.mean().item() == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("features", [1, 7, 16])
def test_masked_keeps_or_zeroes_in_every_type(dtype, features):
    keys = mix32(torch.arange(200, dtype=torch.int32))
    bits = keep_bits(keys, features, torch.full((200, 1), last_dropped(0.4), dtype=torch.int16))
    assert bits.shape == (200, features)
    values = torch.randn(200, features).to(dtype)
    expected = torch.where(bits == -1, values, torch.zeros_like(values))
    assert torch.equal(masked(values, bits), expected)
    assert set(bits.unique().tolist()) == {-1, 0}


@pytest.mark.parametrize("features", [1, 7, 16])
def test_what_is_compiled_for_it_is_the_same(features):
    keys = mix32(torch.arange(300, dtype=torch.int32))
    places = mix32(torch.arange((features + 1) // 2, dtype=torch.int32))
    last = torch.full((300, 1), last_dropped(0.4), dtype=torch.int16)
    found = _keep_bits.source(keys, places, features, last)
    assert torch.equal(found, _keep_bits.plain(keys, places, features, last))


def test_tokens_of_one_pass_have_their_own_probabilities():
    keys = mix32(torch.arange(6000, dtype=torch.int32))
    shares = [0.0, 0.25, 0.75]
    last = torch.tensor([last_dropped(p) for p in shares], dtype=torch.int16)
    bits = keep_bits(keys, 64, last.repeat_interleave(2000)[:, None])
    kept = -bits.view(3, 2000, 64).double().mean((1, 2))
    torch.testing.assert_close(kept, 1 - torch.tensor(shares).double(), atol=0.005, rtol=0)
    assert kept[0] == 1


def test_mix32_is_a_bijection_and_masks_are_pinned():
    keys = torch.arange(-(2**16), 2**16, dtype=torch.int32)
    assert len(mix32(keys).unique()) == len(keys)
    # MurmurHash3's finaliser of 1 is 0x514e28b7.
    assert mix32(torch.tensor(1, dtype=torch.int32)).item() == 0x514E28B7
    # Restored runs need the same masks from every version of this code.
    last = torch.full((2, 1), last_dropped(0.5), dtype=torch.int16)
    assert (-keep_bits(mix32(keys[:2]), 8, last)).tolist() == PINNED


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
