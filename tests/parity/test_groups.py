"""Runs that are computed together get what each gets alone, whatever becomes of one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from parity.group_members import MEMBERS, SGD, Member, bits, entries, groups, open_all, runs
from parity.loss_calls import LOSSES
from parity.scarce_memory import fault_at
from parity.tiny_models import GATED
from parity.tiny_runs import metric, tiny_llama

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import freeze
from workers.engine.batched_products import Grouped, PaddedBmm
from workers.engine.engine import TorchBackend
from workers.engine.products import SegmentLoop
from workers.operations import LossOutcome, LossRequest, Reduction, StepOutcome, StepRequest

BASE = freeze("tiny", tiny_llama())
EXACT = freeze("tiny", tiny_llama().double())
EVERY_LOSS = tuple(LOSSES)
EPSILON = torch.finfo(torch.float32).eps
PRODUCTS = {"loop": SegmentLoop(), "bmm": PaddedBmm(), "grouped": Grouped()}


@pytest.fixture(autouse=True)
def loop_again():
    """No test changes the model but for how it computes what adapters add."""
    yield
    BASE.product = PRODUCTS["loop"]


def examples(count: int):
    """Without shrinking, which would take minutes for models."""
    return hypothesis(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def check_against_alone(members: list[Member], token_budget: int) -> None:
    together, alone = (open_all(BASE, members, token_budget) for _ in range(2))
    outcomes = together.forward_backward_group(entries(members))
    for (run, seq, request), outcome in zip(entries(members), outcomes, strict=True):
        note(f"run {run}: {outcome}")
        assert isinstance(outcome, LossOutcome)
        own = alone.forward_backward(run, seq, request)
        np.testing.assert_allclose(outcome.logprobs, own.logprobs, rtol=0, atol=5e-5)
        size = float(np.abs(request.batch.weights * own.logprobs).sum())
        divisor = together._runs[run].window.denominator
        if request.reduction is Reduction.SUM:
            divisor = 1.0
        assert metric(outcome, "loss") == pytest.approx(
            metric(own, "loss"), abs=1e-5 * size / divisor
        )
        ours, theirs = (b._runs[run].accumulator for b in (together, alone))
        for (name, part), reference in zip(
            alone._runs[run].adapter.named(theirs).items(),
            together._runs[run].adapter.named(ours).values(),
            strict=True,
        ):
            # Rounding is all there is where a gradient is nearly zero: a divergence's of a model
            # that is next to its reference (differences of probabilities), a query's of a token
            # that sees only itself (differences of its run's other gradients).
            note(f"{name}: {part.norm()} of {theirs.norm()}")
            rounding = EPSILON * max(1.0, theirs.norm().item())
            assert (part - reference).norm() <= 1e-4 * part.norm() + rounding
        assert metric(outcome, "tokens") == sum(members[int(run)].lengths)
        scored = request.batch.weights.reshape(len(request.batch.input_tokens), -1).any(1)
        assert metric(outcome, "scored_tokens") == scored.sum()


@pytest.mark.parametrize("token_budget", [60, 100_000])
@examples(12)
@given(members=groups(2, EVERY_LOSS))
def test_two_runs_together_are_each_alone(members, token_budget):
    check_against_alone(members, token_budget)


@pytest.mark.parametrize("count", [2, 8, 32])
@pytest.mark.parametrize("product", ["loop", "bmm"])  # grouped_mm has no float64
@examples(2)
@given(data=st.data(), token_budget=st.sampled_from([90, 10**6]))
def test_in_float64_runs_together_are_each_alone_to_nine_digits(product, count, data, token_budget):
    EXACT.product = PRODUCTS[product]
    members = data.draw(groups(count, EVERY_LOSS))
    together, alone = (open_all(EXACT, members, token_budget) for _ in range(2))
    outcomes = together.forward_backward_group(entries(members))
    for (run, seq, request), outcome in zip(entries(members), outcomes, strict=True):
        own = alone.forward_backward(run, seq, request)
        assert outcome.outputs.keys() == own.outputs.keys()
        for name, output in own.outputs.items():
            found = outcome.outputs[name].values
            np.testing.assert_allclose(found, output.values, rtol=1e-9, atol=1e-9)
        for found, expected in zip(outcome.metrics, own.metrics, strict=True):
            assert found.name == expected.name
            assert found.value == pytest.approx(expected.value, rel=1e-9, abs=1e-9), found.name
        ours, theirs = (b._runs[run] for b in (together, alone))
        reference = theirs.adapter.named(theirs.accumulator)
        for name, part in ours.adapter.named(ours.accumulator).items():
            assert distance(part, reference[name]) <= 1e-9, name


@pytest.mark.parametrize("product", PRODUCTS)
@examples(5)
@given(members=groups(8, EVERY_LOSS), token_budget=st.sampled_from([150, 100_000]))
def test_eight_runs_together_are_each_alone(product, members, token_budget):
    BASE.product = PRODUCTS[product]
    check_against_alone(members, token_budget)


@pytest.mark.parametrize("product", PRODUCTS)
@examples(2)
@given(members=groups(32, EVERY_LOSS), token_budget=st.sampled_from([500, 100_000]))
def test_thirty_two_runs_together_are_each_alone(product, members, token_budget):
    BASE.product = PRODUCTS[product]
    check_against_alone(members, token_budget)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
@examples(25)
@given(members=groups(32, EVERY_LOSS), token_budget=st.sampled_from([90, 500, 100_000]))
def test_many_groups_of_thirty_two_runs_are_each_alone(product, members, token_budget):
    BASE.product = PRODUCTS[product]
    check_against_alone(members, token_budget)


@examples(6)
@given(members=groups(8))
def test_optimizers_that_step_together_give_the_bits_of_each_alone(members):
    check_steps_against_alone(members)


ADAMW = {"name": "adamw", "weight_decay": 0.1}
ONE_OPTION = {
    "name": (ADAMW, {"name": "adam"}),
    "learning_rate": (ADAMW, {"learning_rate": 1e-3}),
    "weight_decay": (ADAMW, {"weight_decay": 0.3}),
    "beta1": (ADAMW, {"beta1": 0.5}),
    "beta2": (ADAMW, {"beta2": 0.9}),
    "eps": (ADAMW, {"eps": 1e-3}),
    "momentum": (SGD, {"momentum": 0.5}),
    "momentum-or-none": (SGD, {"momentum": 0.0}),
    "first-momentum": (SGD, {}),
    "clip": (ADAMW, {"grad_clip_norm": 0.01}),
}


@pytest.mark.parametrize(("options", "change"), ONE_OPTION.values(), ids=ONE_OPTION.keys())
def test_runs_of_one_shape_that_differ_in_one_option_step_together_as_alone(options, change):
    """Their gradients differ, and nothing but the option else."""
    lora = {"rank": 3, "target_modules": GATED}
    check_steps_against_alone(
        [
            Member(seed, lora, options | own, Reduction.TOKEN_MEAN, (9, 14), 1.0)
            for seed, own in enumerate([{}, change, {}, change])
        ]
    )


def check_steps_against_alone(members: list[Member]) -> None:
    together, alone = (open_all(BASE, members) for _ in range(2))
    for call in range(3):
        # Not all at first, so that some step for the first time beside others that have momentum.
        turn = range(0 if call else len(members) // 2, len(members))
        together.forward_backward_group(entries(members, turn, call=call))
        ours = {run: own for run, own in runs(together, members).items() if int(run) in turn}
        theirs = runs(alone, members)
        for run, member in ours.items():
            # The same gradient bit for bit, so that only the step can differ.
            alone.forward_backward_group(entries(members, [int(run)], call=call))
            theirs[run].accumulator.copy_(member.accumulator)
        outcomes = together.optim_step_group([(run, StepRequest()) for run in ours])
        for run, outcome in zip(ours, outcomes, strict=True):
            assert isinstance(outcome, StepOutcome)
            own = alone.optim_step(run, StepRequest())
            assert (outcome.step, outcome.grad_norm) == (own.step, own.grad_norm)
            assert torch.equal(ours[run].adapter.weights, theirs[run].adapter.weights)
            moments = theirs[run].optimizer.state()
            assert moments.keys() == ours[run].optimizer.state().keys()
            for name, value in ours[run].optimizer.state().items():
                assert torch.equal(value, moments[name])


def _bad_token(backend: TorchBackend, run: str, request: LossRequest) -> None:
    request.batch.input_tokens[-1] = 10**6


def _nan(backend: TorchBackend, run: str, request: LossRequest) -> None:
    _fill(backend, run, float("nan"))


def _infinity(backend: TorchBackend, run: str, request: LossRequest) -> None:
    _fill(backend, run, float("inf"))


def _fill(backend: TorchBackend, run: str, number: float) -> None:
    with torch.no_grad():
        backend._runs[run].adapter.weights[::7] = number


def _infinite_gradient(backend: TorchBackend, run: str, request: LossRequest) -> None:
    """Σ w·nll is about 1e37. B·A is what it was, but A's gradient is beyond float32."""
    request.batch.weights[:] = 0
    request.batch.weights[-1] = 1e36
    with torch.no_grad():
        for name, tensor in backend._runs[run].adapter.named().items():
            tensor.mul_(1e-5 if ".lora_A." in name else 1e5)


FAILURES = {
    "refused": (_bad_token, "TOKEN_OUT_OF_RANGE", MEMBERS),
    "nan": (_nan, "NON_FINITE_LOSS", MEMBERS),
    "infinity": (_infinity, "NON_FINITE_LOSS", MEMBERS),
    "infinite-gradient": (
        _infinite_gradient,
        "NON_FINITE_GRADIENT",
        # Enough of an adapter that its gradient is large.
        st.integers(0, 2**31).map(
            lambda seed: Member(
                seed, {"rank": 4, "target_modules": GATED}, {}, Reduction.SUM, (9, 14), 0.8
            )
        ),
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    ("token_budget", "product"),
    [(70, "loop"), (100_000, "loop"), (100_000, "bmm"), (100_000, "grouped")],
)
@examples(3)
@given(
    members=st.sampled_from([1, 3, 7]).flatmap(groups),
    place=st.integers(0, 7),
    data=st.data(),
)
def test_one_that_fails_leaves_the_others_their_bits(
    tmp_path_factory, failure, token_budget, product, members, place, data
):
    BASE.product = PRODUCTS[product]
    victim = data.draw(FAILURES[failure][2])
    check_one_that_fails(tmp_path_factory, failure, token_budget, members, place, victim)


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("product", PRODUCTS)
@examples(10)
@given(
    members=st.sampled_from([1, 7, 31]).flatmap(lambda count: groups(count, EVERY_LOSS)),
    place=st.integers(0, 31),
    token_budget=st.sampled_from([70, 500, 100_000]),
    data=st.data(),
)
def test_one_that_fails_among_many_of_every_loss_leaves_them_their_bits(
    tmp_path_factory, failure, product, members, place, token_budget, data
):
    BASE.product = PRODUCTS[product]
    victim = data.draw(FAILURES[failure][2])
    check_one_that_fails(tmp_path_factory, failure, token_budget, members, place, victim)


def check_one_that_fails(
    tmp_path_factory: pytest.TempPathFactory,
    failure: str,
    token_budget: int,
    members: list[Member],
    place: int,
    victim: Member,
) -> None:
    fail, reason, _ = FAILURES[failure]
    place = min(place, len(members))
    everyone = [*members[:place], victim, *members[place:]]
    others = [str(index) for index in range(len(everyone)) if index != place]
    bad = str(place)
    backend, without = (open_all(BASE, everyone, token_budget) for _ in range(2))
    before = tmp_path_factory.mktemp("before")
    backend.save_state(bad, before, include_optimizer=True)

    calls = entries(everyone)
    fail(backend, bad, calls[place][2])
    outcomes = backend.forward_backward_group(calls)
    own = outcomes.pop(place)
    clean = without.forward_backward_group(entries(everyone, [int(run) for run in others]))
    assert bits(backend, outcomes, others) == bits(without, clean, others)

    if reason == "NON_FINITE_GRADIENT":
        assert isinstance(own, LossOutcome)
        assert np.isfinite(metric(own, "loss"))
        assert not np.isfinite(metric(own, "grad_norm"))
        assert not backend._runs[bad].accumulator.isfinite().all()
        closing = reason
    else:
        assert isinstance(own, TenSafeFault)
        assert own.detail.reason == reason
        assert backend._runs[bad].accumulator is None
        closing = "WINDOW_POISONED"
    with pytest.raises(TenSafeFault) as caught:
        backend.optim_step(bad, StepRequest())
    assert caught.value.detail.reason == closing

    # The next window is as good as new.
    backend.load_state(bad, before, True)
    again = backend.forward_backward_group(entries(everyone, [place]))
    expected = without.forward_backward_group(entries(everyone, [place]))
    assert bits(backend, again, [bad]) == bits(without, expected, [bad])


def test_an_infinite_gradient_leaves_its_neighbour_the_passes_that_it_has_without_it():
    """Its 60 tokens are one pass; beside the other, a row each of two, with other rounding."""
    lora = {"rank": 4, "target_modules": GATED}
    everyone = [Member(5, lora, {}, Reduction.SUM, lengths, 0.8) for lengths in ((40,), (30, 30))]
    backend, without, beside = (open_all(BASE, everyone, 70) for _ in range(3))
    calls = entries(everyone)
    beside_outcomes = beside.forward_backward_group(calls)
    _infinite_gradient(backend, "0", calls[0][2])
    outcomes = backend.forward_backward_group(calls)
    assert not np.isfinite(metric(outcomes[0], "grad_norm"))
    expected = bits(without, without.forward_backward_group(entries(everyone, [1])), ["1"])
    assert bits(beside, beside_outcomes[1:], ["1"]) != expected
    assert bits(backend, outcomes[1:], ["1"]) == expected


def test_what_does_not_fit_beside_one_that_fails_is_found_out_once():
    """The calls that stay are computed as without it; the calls to come know."""
    lora = {"rank": 4, "target_modules": GATED}
    everyone = [Member(seed, lora, {}, Reduction.SUM, (40,), 0.9) for seed in range(3)]
    backend, without = (open_all(BASE, everyone, 1000) for _ in range(2))
    _fill(backend, "2", float("nan"))
    seen = []
    for call in range(3):
        with fault_at(BASE.body, {0} if call == 0 else set(), backward=True) as passes:
            outcomes = backend.forward_backward_group(entries(everyone, call=call))
        seen.append(passes.tokens)
        if call == 0:
            clean = without.forward_backward_group(entries(everyone, [0, 1]))
            assert bits(backend, outcomes[:2], ["0", "1"]) == bits(without, clean, ["0", "1"])
    assert seen[0][0] == 120  # all three, which did not fit
    assert max(seen[1]) == max(seen[2]) == 40


def test_what_the_calls_that_stay_find_out_is_not_forgotten_again():
    lora = {"rank": 4, "target_modules": GATED}
    everyone = [Member(seed, lora, {}, Reduction.SUM, (40,), 0.9) for seed in range(3)]
    backend = open_all(BASE, everyone, 1000)
    _fill(backend, "2", float("nan"))
    # All three together, and the two that stay: after it each by itself.
    with fault_at(BASE.body, {0, 4}, backward=True) as passes:
        backend.forward_backward_group(entries(everyone))
    assert passes.tokens[:6] == [120, 40, 40, 40, 80, 40]
    assert backend._budgets["tiny"].tokens == 40


@pytest.mark.parametrize("passes", range(26, 32))
def test_beside_one_that_fails_the_budget_learns_nothing(passes):
    """After a lack of memory it grows by passes that fit; those of a call that is taken back
    count for the calls that stay no more than if it had not been there."""
    lora = {"rank": 4, "target_modules": GATED}
    everyone = [
        Member(seed, lora, {}, Reduction.SUM, lengths, 0.9)
        for seed, lengths in enumerate([(20, 18), (19, 17), (40,)])
    ]
    backend, without = (open_all(BASE, everyone, 80) for _ in range(2))
    for each in (backend, without):
        with fault_at(BASE.body, {0}, backward=True):
            each.forward_backward_group(entries(everyone, [0, 1]))
        for call in range(passes):
            each.forward_backward_group(entries(everyone, [0], call=call))
        for run in ("0", "1"):
            each.drop_window(run)
    _fill(backend, "2", float("nan"))
    outcomes = backend.forward_backward_group(entries(everyone))
    assert isinstance(outcomes.pop(), TenSafeFault)
    clean = without.forward_backward_group(entries(everyone, [0, 1]))
    assert bits(backend, outcomes, ["0", "1"]) == bits(without, clean, ["0", "1"])


def test_two_that_fail_in_different_ways_do_not_hide_each_other():
    member = Member(5, {"rank": 4}, {}, Reduction.SUM, (9, 14), 0.8)
    everyone = [member] * 5
    backend, without = (open_all(BASE, everyone) for _ in range(2))
    calls = entries(everyone)
    _nan(backend, "1", calls[1][2])
    _infinite_gradient(backend, "2", calls[2][2])
    _bad_token(backend, "3", calls[3][2])
    outcomes = backend.forward_backward_group(calls)
    reasons = [getattr(getattr(each, "detail", None), "reason", "") for each in outcomes]
    assert reasons == ["", "NON_FINITE_LOSS", "", "TOKEN_OUT_OF_RANGE", ""]
    assert not np.isfinite(metric(outcomes[2], "grad_norm"))
    clean = without.forward_backward_group(entries(everyone, [0, 4]))
    expected = bits(without, clean, ["0", "4"])
    assert bits(backend, [outcomes[0], outcomes[4]], ["0", "4"]) == expected
