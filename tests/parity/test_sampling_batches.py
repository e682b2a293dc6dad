"""Continuous batching: what an operation gives does not depend on what runs beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st
from parity.sampled import (
    completions_of,
    forward_logprobs,
    request_for,
    sample,
    sample_together,
    token_prompts,
)
from parity.scarce_memory import fault_at
from parity.tiny_runs import (
    TARGETS,
    VOCABULARY,
    perturb,
    request_of,
    rows_of,
    settings,
    tiny_llama,
)

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.engine.sampling import prompts as prompts_module
from workers.engine.sampling import sampler as sampler_module
from workers.operations import ArtifactWeights, Prompt, SampleOutcome, StepRequest, Stop

BASE = freeze("tiny", tiny_llama())
RANKS = {"a": 4, "b": 1, "c": 9}
CLOSE = 1e-4


def opened(**options) -> TorchBackend:
    """Three tenants' runs, of different ranks and targets."""
    backend = TorchBackend([BASE], **options)
    for index, (name, rank) in enumerate(RANKS.items()):
        targets = ("q_proj", "v_proj", "down_proj")[: index + 1]
        backend.open_run(name, settings(lora={"rank": rank, "target_modules": targets}), None)
        perturb(backend, name, seed=index)
    return backend


def decoder(backend: TorchBackend):
    return backend.sampler._decoders["tiny"]


def limit_rows(backend: TorchBackend, rows: int) -> TorchBackend:
    decoder(backend)._most_rows = rows
    return backend


@contextmanager
def rows_seen(backend: TorchBackend) -> Iterator[list[int]]:
    """Tokens of each pass through the model."""
    seen: list[int] = []
    handle = BASE.body.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(options["input_ids"].numel()),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        handle.remove()


def assert_same(ours, alone) -> None:
    """The same tokens; numbers as close as rounding lets them be."""
    assert len(ours) == len(alone)
    for one, other in zip(ours, alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.finish_reason == other.finish_reason
        for name in ("logprobs", "raw_logprobs", "top_logprobs", "prompt_logprobs"):
            own, its = getattr(one, name), getattr(other, name)
            assert (own is None) == (its is None)
            if own is not None:
                np.testing.assert_allclose(own, its, rtol=0, atol=CLOSE)


REQUESTS = st.fixed_dictionaries(
    {
        "run": st.sampled_from(["a", "b", "c", None]),
        "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=4),
        "params": st.fixed_dictionaries(
            {
                "max_tokens": st.integers(1, 20),
                "num_samples": st.integers(1, 3),
                "temperature": st.sampled_from([0.0, 0.8, 1.0]),
                "top_k": st.sampled_from([0, 20]),
                "top_p": st.sampled_from([1.0, 0.9]),
                "seed": st.one_of(st.none(), st.integers(0, 3)),
                "top_logprobs": st.sampled_from([0, 2]),
                "prompt_logprobs": st.booleans(),
                "stop": st.sampled_from([Stop(), Stop(tokens=tuple(range(3, 12)))]),
            }
        ),
    }
)


@property_settings(deadline=None, max_examples=25)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=5),
    most_rows=st.sampled_from([1, 3, 64]),
    prompt_tokens=st.sampled_from([1, 30, 512]),
    cache_tokens=st.sampled_from([64, 200, 10_000]),
    later=st.integers(0, 4),
)
def test_each_operation_is_what_it_is_alone(
    requests, most_rows, prompt_tokens, cache_tokens, later
):
    """Whatever the others, however few rows, tokens of prompts or memory there are at once."""
    backend = opened(sample_bytes=cache_tokens * 512 + 2**17)
    own = decoder(backend)
    own._most_rows, own._prompt_tokens = most_rows, prompt_tokens
    asked = {
        f"op-{index}": request_for(
            token_prompts(*each["lengths"], seed=index), each["run"], **each["params"]
        )
        for index, each in enumerate(requests)
    }
    outcomes = sample_together(backend, asked, later=later)
    assert own._cache._taken_tokens() * own._cache.token_bytes <= own._cache.budget_bytes
    assert not own._cache.pools
    lone = opened()
    for name, request in asked.items():
        assert_same(completions_of(outcomes[name]), lone.sample(1, request).completions)


def test_rows_of_all_tenants_go_through_the_model_together():
    backend = opened()
    requests = {run or "base": request_for(token_prompts(5, 9), run) for run in [*RANKS, None]}
    with rows_seen(backend) as seen:
        sample_together(backend, requests)
    # Four operations of two prompts: all prompts at once, then eight rows a step.
    assert seen == [4 * (5 + 9)] + 11 * [8]


def test_a_prompt_is_computed_once_for_all_its_samples():
    backend = opened()
    with rows_seen(backend) as seen:
        sample(backend, token_prompts(30, 20), "a", num_samples=4, max_tokens=3)
    assert seen == [50, 8, 8]
    # Also where its samples come in one after the other: each takes it over from another.
    limit_rows(backend, 2)
    stops = Stop(tokens=tuple(range(3, 40)))
    with rows_seen(backend) as seen:
        ours = sample(backend, token_prompts(30), "a", num_samples=6, max_tokens=9, stop=stops)
    assert len({len(one.tokens) for one in ours}) > 1
    assert seen.count(30) == 1
    assert max(seen[1:]) == 2
    # And for prompts that are the same.
    with rows_seen(backend) as seen:
        sample(backend, 2 * token_prompts(30), "a", max_tokens=2)
    assert seen == [30, 2]


def test_the_place_of_an_ended_row_is_taken_at_once():
    backend = limit_rows(opened(), 3)
    stops = Stop(tokens=tuple(range(3, 30)))
    request = request_for(token_prompts(*range(5, 15)), "a", stop=stops, max_tokens=20)
    with rows_seen(backend) as seen:
        sample_together(backend, {"op": request})
    decoded = [count for count in seen if count <= 3]
    # All steps but the last few are full.
    assert decoded[: -20 - 1] == [3] * len(decoded[: -20 - 1])
    assert decoded.count(3) > 5


def test_no_operation_waits_for_all_rows_of_another():
    """One of a single row that comes behind one of a hundred has its turn next."""
    backend = limit_rows(opened(), 4)
    sampler = backend.sampler
    sampler.submit("large", 1, request_for(token_prompts(9), "a", num_samples=100, max_tokens=5))
    sampler.step()
    sampler.submit("small", 1, request_for(token_prompts(7), "b", max_tokens=5))
    steps = 0
    while not (ended := sampler.collect()):
        sampler.step()
        steps += 1
    assert [name for name, _ in ended] == ["small"]
    assert steps <= 10
    sampler.cancel("large")
    assert not sampler.busy


def test_what_does_not_fit_yet_is_not_overtaken_for_ever():
    backend = opened(sample_bytes=4 * 64 * 512 + 2**17)
    sampler = backend.sampler
    sampler.submit("small", 1, request_for(token_prompts(9), num_samples=40, max_tokens=3))
    sampler.step()
    sampler.submit("large", 1, request_for(token_prompts(60), max_tokens=4))
    order = []
    while len(order) < 2:
        sampler.step()
        order += [name for name, _ in sampler.collect()]
    assert order == ["large", "small"]


def test_an_operation_is_cancelled_between_two_steps_and_others_go_on():
    backend = opened()
    sampler = backend.sampler
    kept, gone = request_for(token_prompts(9, 5), "a"), request_for(token_prompts(8, 30), "b")
    sampler.submit("kept", 1, kept)
    sampler.submit("gone", 1, gone)
    for _ in range(4):
        sampler.step()
    with rows_seen(backend) as seen:
        sampler.cancel("gone")
        while not (ended := sampler.collect()):
            sampler.step()
    assert set(seen) == {2}
    assert [name for name, _ in ended] == ["kept"]
    assert_same(completions_of(ended[0][1]), backend.sample(1, kept).completions)
    assert not decoder(backend)._cache.pools


def test_a_cancel_after_the_end_takes_the_outcome():
    sampler = opened().sampler
    sampler.submit("op", 1, request_for(token_prompts(3), max_tokens=1))
    sampler.step()
    assert sampler.busy
    sampler.cancel("op")
    assert sampler.collect() == []
    assert not sampler.busy


def test_a_row_of_nan_fails_its_own_operation_only():
    """Activations that overflow, though every weight is finite."""
    backend = opened()
    with torch.no_grad():
        backend._runs["b"].adapter.weights.fill_(1e25)
    requests = {run: request_for(token_prompts(9, 5), run) for run in ("a", "b", "c")}
    outcomes = sample_together(backend, requests)
    assert isinstance(outcomes["b"], TenSafeFault)
    assert outcomes["b"].detail.reason == "NON_FINITE_LOSS"
    for run in ("a", "c"):
        assert_same(completions_of(outcomes[run]), sample(backend, token_prompts(9, 5), run))
    # What it left in the cache harms nobody who comes after it.
    again = sample_together(backend, {"a": requests["a"]})
    assert_same(completions_of(again["a"]), completions_of(outcomes["a"]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_not_finite_are_refused(value):
    backend = opened()
    with torch.no_grad():
        backend._runs["b"].adapter.weights[3] = value
    with pytest.raises(TenSafeFault, match="NaN") as caught:
        sample(backend, token_prompts(4), "b")
    assert caught.value.detail.reason == "NON_FINITE_LOSS"
    assert sample(backend, token_prompts(4), "a")


def test_training_goes_on_and_a_sample_keeps_the_weights_of_its_beginning():
    backend = opened()
    prompts = token_prompts(9, 5)
    request = request_for(prompts, "a", temperature=0)
    alone = sample(backend, prompts, "a", temperature=0)
    sampler = backend.sampler

    def train(seq: int) -> None:
        backend.forward_backward("a", seq, request_of(rows_of(seq, [20, 20])))
        backend.optim_step("a", StepRequest(learning_rate=0.3))

    sampler.submit("before", 1, request)
    train(1)  # before its first step, and once more in the middle of it
    sampler.step()
    train(2)
    sampler.step()
    sampler.submit("after", 1, request)
    later = sample_outcomes(sampler, 2)
    assert later["before"].model_step == 0
    assert later["after"].model_step == 2
    assert_same(later["before"].completions, alone)
    assert_same(later["after"].completions, sample(backend, prompts, "a", temperature=0))
    tokens = [[c.tokens.tolist() for c in later[name].completions] for name in ("before", "after")]
    assert tokens[0] != tokens[1]


def sample_outcomes(sampler, count: int) -> dict[str, SampleOutcome]:
    found: dict[str, SampleOutcome] = {}
    while len(found) < count:
        sampler.step()
        for name, outcome in sampler.collect():
            assert isinstance(outcome, SampleOutcome), outcome
            found[name] = outcome
    return found


@pytest.mark.parametrize("change", ["load_state", "close_run", "replace", "set aside"])
def test_whatever_befalls_the_run_a_sample_goes_on_with_its_weights(change, tmp_path):
    backend = opened()
    prompts = token_prompts(9, 5)
    alone = sample(backend, prompts, "a", temperature=0)
    if change == "load_state":
        backend.open_run("twin", backend._runs["a"].settings, None)
        backend.save_state("twin", tmp_path, include_optimizer=False)
    sampler = backend.sampler
    sampler.submit("op", 1, request_for(prompts, "a", temperature=0))
    sampler.step()
    if change == "load_state":
        backend.load_state("a", tmp_path, include_optimizer=False)
    elif change == "close_run":
        backend.close_run("a")
    elif change == "replace":
        backend.open_run("a", settings(), None)
    else:
        backend._runs._limit_bytes = 0
        backend.forward("b", request_of(rows_of(1, [5])))
        assert "a" not in backend._runs.resident
        backend.forward("a", request_of(rows_of(1, [5])))
    assert_same(sample_outcomes(sampler, 1)["op"].completions, alone)


def test_without_room_for_a_copy_the_weights_stay_as_they_are(monkeypatch):
    backend = opened()
    pinned = backend.sampler.pins.of(backend._runs["a"])
    before = pinned.adapter.weights.clone()
    train = request_of(rows_of(1, [5]))

    def scarce(adapter):
        raise MemoryError

    backend.forward_backward("a", 1, train)
    with monkeypatch.context() as patch:
        patch.setattr(type(pinned.adapter), "copy", scarce)
        outcomes = backend.optim_step_group([("a", StepRequest())])
    assert outcomes[0].detail.reason == "OUT_OF_MEMORY"
    backend.drop_window("a")
    backend.forward_backward("a", 2, train)
    assert backend.optim_step("a", StepRequest()).applied
    assert torch.equal(pinned.adapter.weights, before)
    assert not torch.equal(backend._runs["a"].adapter.weights, before)


def test_weights_are_copied_only_if_they_change_while_somebody_samples_from_them():
    backend = opened()
    adapter = backend._runs["a"].adapter
    pins = backend.sampler.pins
    first, second = pins.of(backend._runs["a"]), pins.of(backend._runs["a"])
    assert first is second
    assert first.adapter is adapter
    pins.before_change(backend._runs["a"])
    assert first.adapter is not adapter
    assert torch.equal(first.adapter.weights, adapter.weights)
    assert pins.of(backend._runs["a"]).adapter is adapter
    del second
    pins.before_change(backend._runs["a"])  # nobody is there to copy for
    assert pins._live == {}
    third = pins.of(backend._runs["a"])
    backend.close_run("a")
    assert first.owns_adapter
    assert third.owns_adapter


def test_copies_of_weights_count_as_memory_of_samples():
    """In room for two rows and their adapters, a copy of the first one's makes the second wait."""
    lora = {"rank": 32, "target_modules": TARGETS}
    adapter_bytes = BASE.new_adapter(settings(lora=lora).lora).weights.nbytes

    def begin(memory: int) -> tuple[TorchBackend, list[int]]:
        backend = TorchBackend([BASE], sample_bytes=memory)
        backend.open_run("run", settings(lora=lora), None)
        perturb(backend, "run")
        sampler = backend.sampler
        sampler.submit("before", 1, request_for(token_prompts(5), "run", max_tokens=20))
        sampler.step()
        backend.forward_backward("run", 1, request_of(rows_of(3, [9])))
        backend.optim_step("run", StepRequest(learning_rate=1e-3))
        sampler.submit("behind", 2, request_for(token_prompts(7), "run", max_tokens=20))
        sampler.step()
        live = [job.live for job in decoder(backend)._jobs.values()]
        return backend, live

    rows = 2 * 64 * 512
    wide, live = begin(rows + 3 * adapter_bytes)
    assert live == [1, 1]
    narrow, live = begin(rows + 2 * adapter_bytes)
    assert live == [1, 0]
    both = [sample_outcomes(backend.sampler, 2) for backend in (wide, narrow)]
    for name in ("before", "behind"):
        assert_same(*(completions_of(found[name]) for found in both))


def test_adapters_that_are_kept_of_artifacts_make_room_for_rows(tmp_path):
    """In room for a row and one adapter, loaded and in a pass, no other one is kept."""
    lora = {"rank": 32, "target_modules": TARGETS}
    adapter_bytes = BASE.new_adapter(settings(lora=lora).lora).weights.nbytes
    maker = TorchBackend([BASE])
    artifacts = []
    for index in range(3):
        maker.open_run(f"run-{index}", settings(lora=lora), None)
        perturb(maker, f"run-{index}", seed=index)
        directory = tmp_path / str(index)
        directory.mkdir()
        maker.save_state(f"run-{index}", directory, include_optimizer=False)
        artifacts.append(ArtifactWeights(f"art-{index}", directory))

    def drawn(memory: int) -> tuple[list[list[int]], list[str]]:
        backend = TorchBackend([BASE], sample_bytes=memory)
        tokens = []
        for artifact in artifacts:
            request = request_for(token_prompts(5), None, max_tokens=20)
            request.artifact = artifact
            tokens.append(backend.sample("op", request).completions[0].tokens.tolist())
        return tokens, list(backend.sampler.artifacts._kept)

    row = 64 * 512
    wide, kept = drawn(row + 4 * adapter_bytes)
    assert kept == ["art-0", "art-1", "art-2"]
    narrow, kept = drawn(row + 2 * adapter_bytes)
    assert kept == ["art-2"]
    assert narrow == wide


def test_a_row_that_can_never_fit_fails_by_itself():
    backend = opened(sample_bytes=64 * 512)
    with pytest.raises(TenSafeFault, match="--sample-memory-mib") as caught:
        sample(backend, token_prompts(5, 50), "a")  # its adapter is not free either
    assert caught.value.detail.reason == "OUT_OF_MEMORY"
    assert len(sample(backend, token_prompts(5, 50))) == 2


@pytest.mark.parametrize("at", [0, 1, 5])
def test_running_out_of_memory_at_a_pass_makes_the_batch_smaller_and_loses_nothing(at):
    backend = opened()
    requests = {run: request_for(token_prompts(9, 5, 14), run) for run in RANKS}
    with fault_at(BASE.body, {at}, backward=False) as seen:
        outcomes = sample_together(backend, requests)
    assert seen.faults == 1
    for run in RANKS:
        assert_same(completions_of(outcomes[run]), sample(backend, token_prompts(9, 5, 14), run))


def test_a_row_for_which_there_is_no_memory_even_alone_fails_by_itself():
    backend = opened()
    with fault_at(BASE.body, set(range(100)), backward=False):
        outcomes = sample_together(backend, {"op": request_for(token_prompts(9, 5), "a")})
    assert isinstance(outcomes["op"], TenSafeFault)
    assert outcomes["op"].detail.reason == "OUT_OF_MEMORY"
    assert len(sample(backend, token_prompts(9, 5), "a")) == 2


def test_streamed_pieces_add_up_to_the_completion():
    backend = limit_rows(opened(), 3)
    chunks = []
    requests = {}
    for run in ("a", "b"):
        requests[run] = request_for(token_prompts(5, 9), run, num_samples=2)
        requests[run].stream = run == "a"
        backend.sampler.submit(run, 1, requests[run], chunks.append)
    outcomes = sample_outcomes(backend.sampler, 2)
    assert {chunk.operation_id for chunk in chunks} == {"a"}
    completions = outcomes["a"].completions
    for index, completion in enumerate(completions):
        own = [
            chunk
            for chunk in chunks
            if (chunk.prompt_index, chunk.sample) == (index // 2, index % 2)
        ]
        assert [chunk.position for chunk in own] == list(range(12))  # one a step
        for name in ("tokens", "logprobs", "raw_logprobs"):
            joined = np.concatenate([getattr(chunk, name) for chunk in own])
            np.testing.assert_array_equal(joined, getattr(completion, name))


def test_time_is_shared_by_rows():
    backend = opened()
    outcomes = sample_together(
        backend,
        {
            "one": request_for(token_prompts(5), "a", max_tokens=30),
            "four": request_for(token_prompts(5), "b", num_samples=4, max_tokens=30),
        },
    )
    assert 2 < outcomes["four"].compute_ms / outcomes["one"].compute_ms < 6


def test_raw_logprobs_are_forwards_in_float32():
    backend = opened()
    prompts = token_prompts(5, 30, 2)
    for run in RANKS:
        completions = sample(backend, prompts, run, max_tokens=30, temperature=0.7)
        for completion, own in zip(
            completions, forward_logprobs(backend, run, prompts, completions), strict=True
        ):
            np.testing.assert_allclose(completion.raw_logprobs, own, rtol=0, atol=CLOSE)
            assert np.abs(completion.logprobs - own).max() > 0.01  # another temperature's


def test_samples_follow_the_distribution_that_forward_gives():
    """The first token of 4,000 samples, against the probabilities of the whole vocabulary."""
    backend = opened()
    (prompt,) = token_prompts(6)
    counts: Counter[int] = Counter()
    for seed in range(4):
        ours = sample(backend, [prompt], "c", num_samples=1000, max_tokens=1, seed=seed)
        counts.update(int(one.tokens[0]) for one in ours)
    (one,) = sample(backend, [prompt], "c", max_tokens=1, top_logprobs=96)
    expected = np.exp(one.top_logprobs[0].astype(np.float64)) * 4000
    observed = np.asarray([counts[int(token)] for token in one.top_tokens[0]])
    likely = expected >= 5
    error = (observed[likely] - expected[likely]) ** 2 / expected[likely]
    # χ² with at most 96 degrees of freedom: mean 95, standard deviation 14.
    assert error.sum() < likely.sum() + 6 * np.sqrt(2 * likely.sum())
    assert expected.sum() == pytest.approx(4000, rel=1e-5)


def reading_slowly(monkeypatch: pytest.MonkeyPatch) -> TorchBackend:
    """Three prompts of a call are read at a time."""
    monkeypatch.setattr(sampler_module, "_CHARACTERS_AT_ONCE", 3 * prompts_module._CHARACTERS_EACH)
    return opened()


def test_many_prompts_are_read_between_steps_and_change_nothing(monkeypatch: pytest.MonkeyPatch):
    many = request_for(token_prompts(*range(3, 23)), "a", max_tokens=4)
    expected = opened().sample(1, many).completions
    backend = reading_slowly(monkeypatch)
    sampler = backend.sampler
    sampler.submit("many", 1, many)
    sampler.submit("one", 1, request_for(token_prompts(5), "b", max_tokens=2))
    backend.forward_backward("a", 1, request_of(rows_of(1, [20, 20])))
    backend.optim_step("a", StepRequest(learning_rate=0.5))
    order, outcomes = [], {}
    while len(outcomes) < 2:
        sampler.step()
        ended = dict(sampler.collect())
        order += ended
        outcomes |= ended
    assert order == ["one", "many"], "others need not wait until it is read"
    assert_same(completions_of(outcomes["many"]), expected)
    assert not sampler.busy


def test_a_prompt_that_is_refused_while_others_run_ends_its_operation_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    backend = reading_slowly(monkeypatch)
    bad = Prompt(tokens=np.array([VOCABULARY + 1], np.int32))
    requests = {
        "bad": request_for([*token_prompts(*[4] * 9), bad], "a"),
        "good": request_for(token_prompts(*[4] * 9), "b", max_tokens=2),
    }
    outcomes = sample_together(backend, requests)
    fault = outcomes["bad"]
    assert isinstance(fault, TenSafeFault)
    assert fault.detail.reason == "TOKEN_OUT_OF_RANGE"
    assert "prompts[9]" in str(fault.detail)
    alone = opened().sample(1, requests["good"]).completions
    assert_same(completions_of(outcomes["good"]), alone)


def test_what_is_cancelled_while_it_is_read_is_read_no_further(monkeypatch: pytest.MonkeyPatch):
    backend = reading_slowly(monkeypatch)
    backend.sampler.submit("op", 1, request_for(token_prompts(*[4] * 9), "a"))
    backend.sampler.step()
    backend.sampler.cancel("op")
    assert not backend.sampler.busy
    assert backend.sampler.collect() == []


def test_no_call_waits_until_all_of_a_larger_one_is_read(monkeypatch: pytest.MonkeyPatch):
    backend = reading_slowly(monkeypatch)
    sampler = backend.sampler
    sampler.submit("large", 1, request_for(token_prompts(*[4] * 60), "a", max_tokens=1))
    sampler.submit("small", 1, request_for(token_prompts(*[4] * 6), "b", max_tokens=1))
    steps = 0
    while not (ended := sampler.collect()):
        sampler.step()
        steps += 1
    assert [name for name, _ in ended] == ["small"]
    assert steps <= 4


def test_what_failed_and_is_cancelled_before_it_is_told_is_not_told(
    monkeypatch: pytest.MonkeyPatch,
):
    """As when a step breaks down in the turn in which a prompt was refused."""
    backend = reading_slowly(monkeypatch)
    bad = Prompt(tokens=np.array([VOCABULARY + 1], np.int32))
    backend.sampler.submit("bad", 1, request_for([*token_prompts(*[4] * 3), bad], "a"))
    backend.sampler.step()
    backend.sampler.cancel("bad")
    assert backend.sampler.collect() == []
    assert not backend.sampler.busy
