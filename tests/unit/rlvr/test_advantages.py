"""Advantages against their definitions, and what must hold of all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_client.rlvr.advantages import MovingAverage, advantages, is_equal, token_weights

GROUPS = [np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.2, 1.0, 0.2])]
REWARDS = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
BATCHES = st.lists(
    st.lists(REWARDS, min_size=2, max_size=6).map(np.asarray), min_size=1, max_size=5
)


def fresh() -> MovingAverage:
    return MovingAverage(0.9)


def test_grpo_by_hand():
    """Shao et al. 2024, section 4.1.2: (r − mean(r)) / std(r)."""
    first, second = advantages(GROUPS, "group_mean", "group", fresh())
    np.testing.assert_allclose(first, [1, -1, -1, 1], atol=1e-5)
    spread = np.std([0.2, 1.0, 0.2])
    np.testing.assert_allclose(second, (np.array([0.2, 1.0, 0.2]) - 1.4 / 3) / spread, atol=1e-4)


def test_rloo_compares_with_the_others():
    """Ahmadian et al. 2024, eq. 8: r_i − mean of the other rewards of its prompt."""
    (first, second) = advantages(GROUPS, "group_others", "none", fresh())
    for found, rewards in ((first, GROUPS[0]), (second, GROUPS[1])):
        others = [np.delete(rewards, i).mean() for i in range(len(rewards))]
        np.testing.assert_allclose(found, rewards - others, atol=1e-12)


def test_a_batch_as_baseline_and_scale():
    every = np.concatenate(GROUPS)
    found = np.concatenate(advantages(GROUPS, "batch_mean", "batch", fresh()))
    np.testing.assert_allclose(found, (every - every.mean()) / every.std(), atol=1e-5)
    plain = np.concatenate(advantages(GROUPS, "none", "none", fresh()))
    np.testing.assert_array_equal(plain, every)


def test_the_moving_average_is_that_of_earlier_batches():
    average = fresh()
    first = advantages([np.array([1.0, 0.0])], "moving_average", "none", average)[0]
    np.testing.assert_allclose(first, [0.5, -0.5])  # the first batch has only itself
    second = advantages([np.array([1.0, 1.0])], "moving_average", "none", average)[0]
    np.testing.assert_allclose(second, [0.5, 0.5])
    third = advantages([np.array([0.0])], "moving_average", "none", average)[0]
    expected = (0.9 * 0.1 * 0.5 + 0.1 * 1.0) / (0.9 * 0.1 + 0.1)
    np.testing.assert_allclose(third, [-expected])


def test_other_baselines_leave_the_moving_average_alone():
    average = fresh()
    advantages(GROUPS, "batch_mean", "none", average)
    assert average == fresh()


@given(BATCHES, st.sampled_from(["group_mean", "group_others"]))
def test_within_groups_they_add_up_to_nothing(groups, baseline):
    for found in advantages(groups, baseline, "none", fresh()):
        assert found.sum() == pytest.approx(0, abs=1e-9)


@settings(deadline=None)
@given(
    BATCHES,
    st.sampled_from(["group_mean", "group_others", "batch_mean"]),
    st.sampled_from(["group", "batch", "none"]),
    REWARDS,
)
def test_a_constant_on_all_rewards_changes_nothing(groups, baseline, scale, constant):
    one = np.concatenate(advantages(groups, baseline, scale, fresh()))
    other = np.concatenate(
        advantages([group + constant for group in groups], baseline, scale, fresh())
    )
    assert np.isfinite(one).all()
    np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-3)


def test_lone_rewards_teach_nothing_where_groups_are_compared():
    assert is_equal(np.array([0.2, 0.2]))
    assert is_equal(np.array([]))
    assert not is_equal(np.array([0.2, 1.0]))
    lone = advantages([np.array([3.0])], "group_others", "none", fresh())[0]
    np.testing.assert_array_equal(lone, [0.0])
    assert [len(part) for part in advantages([np.array([])], "group_mean", "group", fresh())] == [0]


@pytest.mark.parametrize("baseline", ["group_mean", "group_others", "batch_mean", "moving_average"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_nothing_at_all_away_from_their_mean(baseline, scale):
    """The mean of equal floats is rounded; a division by their spread would blow that up."""
    average = fresh()
    for _ in range(5):
        for found in advantages([np.full(7, 0.1), np.full(3, 0.1)], baseline, scale, average):
            assert not found.any()


def test_token_weights_make_the_means():
    lengths = [2, 6]
    assert token_weights(lengths, "token", 10) == [1 / 8] * 2
    assert token_weights(lengths, "sequence", 10) == [1 / 4, 1 / 12]
    assert token_weights(lengths, "constant", 10) == [1 / 20] * 2
