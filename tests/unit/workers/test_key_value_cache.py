"""Rows' slots: kept apart, kept whole, wiped, and within their budget."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engine.sampling.cache import KeyValueCache, LayerShape, Place, capacity_for

SHAPES = (LayerShape(2, 3, 3), LayerShape(1, 4, 2))
TOKEN_BYTES = 4 * (2 * 6 + 6)


def cache_of(tokens: int) -> KeyValueCache[int]:
    return KeyValueCache(SHAPES, torch.float32, "cpu", tokens * TOKEN_BYTES)


def fill(place: Place[int], length: int) -> None:
    """What a row would write: numbers of its own."""
    for layer, shape in enumerate(SHAPES):
        keys = torch.full((length, shape.groups, shape.key_size), float(place.owner + 1))
        values = torch.full((length, shape.groups, shape.value_size), -float(place.owner + 1))
        place.write(layer, keys, values)
    place.length = length


def assert_whole(place: Place[int]) -> None:
    for index, tensor in enumerate(place.pool.by_token()):
        number = (place.owner + 1) * (1 if index < len(SHAPES) else -1)
        row = tensor[place.slot]
        assert (row[: place.length] == number).all()
        assert not row[place.length :].any()  # and nothing of anybody else behind it


def assert_wiped(cache: KeyValueCache[int]) -> None:
    for pool in cache.pools.values():
        for tensor in (*pool.keys, *pool.values):
            assert not tensor[len(pool.places) :].any()


def test_capacities_are_few_and_not_much_more_than_needed():
    assert [capacity_for(n) for n in (1, 64, 65, 1024, 1025, 1536, 1537, 2049)] == [
        64,
        64,
        128,
        1024,
        1536,
        1536,
        2048,
        3072,
    ]
    for tokens in range(1, 20_000, 7):
        capacity = capacity_for(tokens)
        assert tokens <= capacity <= max(64, 2 * tokens)
        assert capacity <= 1.5 * tokens or tokens <= 1024
    assert len({capacity_for(n) for n in range(1, 131_072)}) < 22


STEPS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 200), st.booleans()),
    st.tuples(st.just("release"), st.integers(0, 30)),
    st.tuples(st.just("write"), st.integers(0, 30), st.integers(1, 200)),
    st.tuples(st.just("copy"), st.integers(0, 30), st.integers(0, 30), st.integers(1, 200)),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(STEPS, max_size=60), st.sampled_from([64, 300, 1000]))
def test_rows_keep_their_numbers_through_anything(steps, budget):
    cache, held = cache_of(budget), []
    for number, (what, *rest) in enumerate(steps):
        if what == "take":
            tokens, alone = rest
            place = cache.take(tokens, number, alone=alone)
            if place is not None:
                fill(place, min(3, tokens))
                held.append(place)
            elif not held:
                assert not cache.fits(tokens)
        elif held and what == "release":
            cache.release(held.pop(rest[0] % len(held)))
        elif held and what == "write":
            place = held[rest[0] % len(held)]
            fill(place, max(place.length, min(rest[1], place.pool.capacity)))
        elif held and what == "copy":
            source, target = held[rest[0] % len(held)], held[rest[1] % len(held)]
            length = min(rest[2], source.length, target.pool.capacity)
            if source is not target and length >= target.length:
                target.pool.copy(source, target, length)
                target.owner = source.owner
        for place in held:
            assert_whole(place)
        assert_wiped(cache)
        assert cache._taken_tokens() <= budget
        assert all(
            place.slot == slot
            for pool in cache.pools.values()
            for slot, place in enumerate(pool.places)
        )
    for place in held:
        cache.release(place)
    assert not cache.pools
    assert cache._taken_tokens() == 0


def test_what_a_row_left_behind_its_heirs_tokens_goes_with_the_heir():
    cache = cache_of(500)
    first, second = cache.take(60, 0), cache.take(60, 1)
    fill(first, 50)
    fill(second, 10)
    first.hand_over(0, 5)
    cache.release(first)
    assert_whole(second)
    assert_wiped(cache)
    second.hand_over(1, 4)
    third = cache.take(60, 2)
    fill(third, 7)
    cache.release(second)
    assert_whole(third)
    assert_wiped(cache)


def test_empty_slots_make_room_for_rows_of_another_size():
    cache = cache_of(64 * 8)
    small = [cache.take(64, number) for number in range(8)]
    assert cache.take(128, 9) is None
    for place in small[2:]:
        cache.release(place)
    for number in range(3):
        assert cache.take(128, number) is not None
    assert cache.take(64, 9) is None


def test_what_is_beside_the_rows_counts():
    cache = cache_of(128)
    cache.beside_bytes = 65 * TOKEN_BYTES
    assert cache.take(64, 0) is None
    assert cache.fits(64, 64 * TOKEN_BYTES)
    assert not cache.fits(64, 65 * TOKEN_BYTES)
    cache.beside_bytes = 0
    assert cache.take(64, 0) is not None


def test_memory_that_was_promised_and_is_not_there_lowers_the_budget(monkeypatch):
    cache = cache_of(1000)
    assert cache.take(64, 0) is not None

    def fail(*_args, **_options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", fail)
    assert cache.take(128, 1) is None
    monkeypatch.undo()
    assert cache.tokens == 64
    assert cache.take(64, 1) is None
