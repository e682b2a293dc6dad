"""Losses through the service: real processes, a real engine on a tiny model."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.command_line import run_json, run_tensafe
from local_service import LocalService, LocalServiceError, local_service

from tensafe_client import (
    ArtifactInUseError,
    ArtifactMismatchError,
    ArtifactNotFoundError,
    AsyncServiceClient,
    BatchError,
    Datum,
    InvalidArgumentError,
    Logprobs,
    MixedReductionError,
    ServiceClient,
    TenSafeError,
    TrainingClient,
    UnsupportedOptionError,
    WindowPoisonedError,
)

TESTS = Path(__file__).parents[1]
PLACE = "harness.plug_in_losses"
BUILT_IN = {
    *("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "dpo", "kl"),
    "linear",
}
LENGTHS = (12, 7, 20, 9)
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITHOUT_DROPOUT = {"rank": 4, "dropout": 0, "target_modules": EVERYWHERE}


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[LocalService]:
    """A service with two models and two plug-ins."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    plug_ins = [f"huber={PLACE}:huber", f"wrong_shape={PLACE}:wrong_shape"]
    with local_service(
        backend="torch",
        models=[f"tiny={tiny_model}", f"twin={tiny_model}"],
        options=["--dtype", "float32", *(part for one in plug_ins for part in ("--loss", one))],
        environment={"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        directory=tmp_path_factory.mktemp("plugged"),
    ) as running:
        yield running


@pytest.fixture
def client(plugged: LocalService) -> Iterator[ServiceClient]:
    with ServiceClient(plugged.target, api_key=plugged.api_key) as made:
        yield made


def new_run(client: ServiceClient, **changes: Any) -> TrainingClient:
    config = {
        "model_ref": "tiny",
        "seed": 4,
        "lora_config": {"rank": 4, "dropout": 0.2, "target_modules": EVERYWHERE},
        "optimizer": {"learning_rate": 1e-2},
    }
    return client.create_training_client({**config, **changes})


def datums(seed: int = 0, **inputs: Callable[[np.random.Generator, int], Any]) -> list[Datum]:
    """Sequences with an unscored prompt, and what each loss wants."""
    rng = np.random.default_rng(seed)
    found = []
    for length in LENGTHS:
        tokens = rng.integers(3, 250, length + 1)
        given = {name: make(rng, length) for name, make in inputs.items()}
        found.append(Datum(tokens[:-1], tokens[1:], np.arange(length) > 2, **given))
    return found


def sampled(seed: int = 0) -> list[Datum]:
    """As a policy has sampled them: log-probabilities on both sides of the clips."""
    return datums(
        seed,
        logprobs=lambda rng, size: rng.normal(-5.55, 0.3, size),
        advantages=lambda rng, size: rng.normal(),
    )


def test_what_there_is(client: ServiceClient, plugged: LocalService) -> None:
    losses = {loss.name: loss for loss in client.losses()}
    assert losses.keys() == BUILT_IN | {"huber", "wrong_shape"}
    assert {name for name, loss in losses.items() if loss.plug_in} == {"huber", "wrong_shape"}
    assert all(loss.models == ("tiny", "twin") for loss in losses.values())
    huber = losses["huber"]
    assert [(i.name, i.dtype, i.required) for i in huber.inputs][2:] == [
        ("wanted", "float32", True),
        ("kinds", "int32", False),
    ]
    assert [(option.name, option.default) for option in huber.options] == [
        ("delta", 1.0),
        ("entropy", False),
    ]
    assert losses["ppo"].reductions == ("token_mean", "sequence_mean", "sum")
    assert losses["dpo"].datums_together == 2
    assert losses["dpo"].reductions[0] == "sequence_mean"
    assert [loss.models for loss in client.losses("twin")] == [("twin",)] * len(losses)
    with pytest.raises(TenSafeError, match="no model is registered"):
        client.losses("other")
    listed = run_json(plugged, "models", "losses", "tiny")
    assert {loss["name"] for loss in listed} == losses.keys()
    shown = run_tensafe(plugged, "models", "losses").stdout
    assert "clip_low=0.8" in shown
    assert "the operator" in shown


def test_a_service_does_not_start_without_its_losses(tiny_model: Path) -> None:
    with (
        pytest.raises(LocalServiceError, match=r"--loss x=no\.such:f cannot be imported"),
        local_service(
            backend="torch",
            models=[f"tiny={tiny_model}"],
            options=["--dtype", "float32", "--loss", "x=no.such:f"],
        ),
    ):
        pass


def test_a_plug_in_trains(client: ServiceClient) -> None:
    tc = new_run(client)
    kinds = {"kinds": lambda rng, size: (np.arange(size) % 2).astype(np.int32)}
    batch = datums(wanted=lambda rng, size: -5.0, **kinds)
    config = {"delta": 0.5, "entropy": True}
    sent = [
        (tc.forward_backward(batch, "huber", loss_config=config), tc.optim_step())
        for _ in range(15)
    ]
    results = [passed.result(120) for passed, stepped in sent if stepped.result(120)]
    assert results[-1].loss < 0.8 * results[0].loss
    assert results[0].metrics["distance"] > 0
    assert [len(entropy) for entropy in results[0].outputs["entropy"]] == list(LENGTHS)
    lp, scored = np.concatenate(results[0].logprobs), np.concatenate([d.weights for d in batch])
    counts = np.concatenate([d.inputs["kinds"] for d in batch])
    gap = np.abs(lp + 5)
    values = np.where(gap < 0.5, gap**2 / 2, 0.5 * (gap - 0.25)) * counts * scored
    assert results[0].loss == pytest.approx(values.sum() / scored.sum(), rel=1e-4)


def test_a_plug_in_that_is_wrong_fails_its_own_call(
    client: ServiceClient, plugged: LocalService
) -> None:
    bad, good = new_run(client), new_run(client)
    futures = [bad.forward_backward(datums(), "wrong_shape"), bad.optim_step()]
    passed = good.forward_backward(datums())
    with pytest.raises(TenSafeError, match="wrong_shape, a plug-in of the operator") as caught:
        futures[0].result(120)
    assert caught.value.reason == "INTERNAL"
    assert caught.value.metadata["error_id"] in plugged.log
    with pytest.raises(WindowPoisonedError):
        futures[1].result(120)
    assert np.isfinite(passed.result(120).loss)
    bad.forward_backward(datums())
    assert bad.optim_step().result(120).applied


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_policy_losses_move_probability_by_their_advantages(
    client: ServiceClient, loss: str
) -> None:
    """One sequence is better than expected, the other worse; the ratio starts at 1."""
    tc = new_run(client, lora_config=WITHOUT_DROPOUT)
    plain = datums()[:2]
    before = tc.forward(plain).result(120).logprobs
    batch = [
        Datum(d.tokens, d.target_tokens, d.weights, logprobs=logprobs, advantages=advantage)
        for d, logprobs, advantage in zip(plain, before, (1, -1), strict=True)
    ]
    # Beyond the clip nothing would move any more.
    config = {} if loss in ("importance_sampling", "dro") else {"clip_low": 0.0, "clip_high": 99.0}
    sent = [
        (tc.forward_backward(batch, loss, loss_config=config), tc.optim_step()) for _ in range(4)
    ]
    first = sent[0][0].result(120).metrics
    assert first["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert first["approx_kl"] == pytest.approx(0, abs=1e-5)
    assert sent[-1][1].result(120).step == 4
    after = tc.forward(plain).result(120).logprobs
    gains = [float((now - then).sum()) for now, then in zip(after, before, strict=True)]
    assert gains[0] > 0.1
    assert gains[1] < -0.1
    steps = list(tc.metrics())
    assert len(steps) == 4
    assert steps[-1].values["approx_kl"] > first["approx_kl"]


def test_ppo_stops_at_its_clip(client: ServiceClient) -> None:
    tc = new_run(client, lora_config=WITHOUT_DROPOUT)
    (plain,) = datums()[:1]
    (before,) = tc.forward([plain]).result(120).logprobs
    given = {"logprobs": before, "advantages": 1}
    batch = [Datum(plain.tokens, plain.target_tokens, plain.weights, **given)]
    for _ in range(30):
        tc.forward_backward(batch, "ppo")
        tc.optim_step()
    result = tc.forward(batch, "ppo").result(120)
    assert result.metrics["clip_fraction"] > 0.5
    assert result.loss == pytest.approx(-1.2, abs=0.1)


def preferences(count: int, seed: int) -> list[Datum]:
    """Synthetic: completions of even tokens are preferred to those of odd ones."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = rng.integers(3, 250, 4)
        for parity in (0, 1):
            completion = 2 * rng.integers(5, 120, 6) + parity
            tokens = np.concatenate([prompt, completion])
            found.append(Datum(tokens[:-1], tokens[1:], np.arange(9) >= 3))
    return found


@pytest.mark.parametrize("given", [False, True], ids=["base-model", "given-logprobs"])
def test_dpo_raises_the_margin(client: ServiceClient, given: bool) -> None:
    tc = new_run(client)
    held_out = preferences(16, seed=99)
    train = [preferences(8, seed) for seed in range(25)]
    if given:
        for batch in [held_out, *train]:
            logprobs = tc.forward(batch).result(120).logprobs
            for datum, own in zip(batch, logprobs, strict=True):
                datum.inputs["reference_logprobs"] = own
    before = tc.forward(held_out, "dpo").result(120)
    assert before.metrics["margin"] == pytest.approx(0, abs=1e-4)
    assert before.loss == pytest.approx(np.log(2), abs=1e-4)
    for batch in train:
        tc.forward_backward(batch, "dpo")
        tc.optim_step()
    after = tc.forward(held_out, "dpo").result(120)
    assert after.metrics["margin"] > 0.05
    assert after.metrics["chosen_reward"] > 0 > after.metrics["rejected_reward"]
    assert after.metrics["accuracy"] > 0.8
    assert after.loss < before.loss - 0.02
    rewards = np.concatenate(after.outputs["reward"])
    assert rewards.shape == (32,)
    margins = rewards[::2] - rewards[1::2]
    assert margins.mean() == pytest.approx(after.metrics["margin"], rel=1e-4)


def test_kl_brings_a_run_back_to_its_base_and_to_an_artifact(client: ServiceClient) -> None:
    tc = new_run(client)
    for _ in range(10):
        tc.forward_backward(datums())
        tc.optim_step()
    teacher = tc.save_state(include_optimizer=False).artifact_id
    start = tc.forward(datums(1), "kl").result(120)
    assert start.loss > 0.01
    assert tc.forward(datums(1), "kl", loss_config={"reference": teacher}).result(120).loss == (
        pytest.approx(0, abs=1e-6)
    )
    student = new_run(client, seed=9)
    config = {"reference": teacher, "direction": "forward"}
    losses = []
    for _ in range(15):
        losses.append(student.forward_backward(datums(1), "kl", loss_config=config))
        student.optim_step()
    assert losses[-1].result(120).loss < 0.7 * losses[0].result(120).loss
    # The run's recovery would need it again.
    with pytest.raises(ArtifactInUseError):
        client.delete_artifact(teacher)
    for _ in range(25):
        tc.forward_backward(datums(1), "kl")
        tc.optim_step()
    assert tc.forward(datums(1), "kl").result(120).loss < 0.9 * start.loss


def test_another_tenants_artifact_is_none(client: ServiceClient, plugged: LocalService) -> None:
    artifact = new_run(client).save_state().artifact_id
    with ServiceClient(plugged.target, api_key=plugged.admin_key) as operator:
        operator.admin.create_tenant("other")
        key = operator.admin.create_key("other").secret
    with ServiceClient(plugged.target, api_key=key) as other:
        tc = new_run(other)
        config = {"reference": artifact}
        with pytest.raises(ArtifactNotFoundError):
            tc.forward_backward(datums(), "kl", loss_config=config).result(120)
        with pytest.raises(WindowPoisonedError):
            tc.optim_step().result(120)


def torch_ppo(batch: list[Datum]) -> Callable[[Logprobs], Any]:
    """The built-in PPO's sum, by the caller."""

    def loss(logprobs: Logprobs) -> Any:
        terms = []
        for datum, lp in zip(batch, logprobs.torch(), strict=True):
            q, advantages = (torch.from_numpy(datum.inputs[n]) for n in ("logprobs", "advantages"))
            scored = torch.from_numpy(datum.weights) != 0
            ratios = (lp - q).exp()
            both = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
            terms.append(-both[scored].sum())
        return torch.stack(terms).sum()

    return loss


def numpy_cross_entropy(batch: list[Datum]) -> Callable[[Logprobs], Any]:
    def loss(logprobs: Logprobs) -> Any:
        total = -sum(float(datum.weights @ lp) for datum, lp in zip(batch, logprobs, strict=True))
        return total, [-datum.weights for datum in batch], {"mine": 7}

    return loss


@pytest.mark.parametrize(
    ("built_in", "custom", "make"),
    [("ppo", torch_ppo, sampled), ("cross_entropy", numpy_cross_entropy, datums)],
)
def test_a_custom_loss_is_the_built_in_one_to_the_bit(
    client: ServiceClient, built_in: str, custom: Any, make: Any
) -> None:
    """Gradients, updates and the losses after them, under dropout, several calls to an update."""
    theirs, ours = (new_run(client, deterministic=True) for _ in range(2))
    sent = []
    for step in range(3):
        for call in range(2):
            batch = make(2 * step + call)
            sent.append(
                (
                    theirs.forward_backward(batch, built_in, reduction="sum"),
                    ours.forward_backward_custom(batch, custom(batch)),
                )
            )
        sent.append((theirs.optim_step(), ours.optim_step()))
    for one, two in sent:
        expected, found = one.result(120), two.result(120)
        if hasattr(expected, "step"):
            assert (found.step, found.grad_norm) == (expected.step, expected.grad_norm)
            continue
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == expected.grad_norm
        for mine, its in zip(found.logprobs, expected.logprobs, strict=True):
            np.testing.assert_array_equal(mine, its)
    for mine, its in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert mine.loss == pytest.approx(its.loss, rel=1e-5)


def test_a_custom_loss_of_soft_targets(client: ServiceClient) -> None:
    rng = np.random.default_rng(5)
    batch = []
    for length in LENGTHS:
        tokens, targets = rng.integers(3, 250, length), rng.integers(3, 250, (length, 3))
        batch.append(Datum(tokens, targets, rng.choice([0, 0.2, 0.5], (length, 3))))
    theirs, ours = new_run(client), new_run(client)

    def loss(logprobs: Logprobs) -> Any:
        assert [lp.shape for lp in logprobs] == [(length, 3) for length in LENGTHS]
        return -sum(
            (torch.from_numpy(datum.weights) * lp).sum()
            for datum, lp in zip(batch, logprobs.torch(), strict=True)
        )

    expected = theirs.forward_backward(batch, reduction="sum").result(120)
    found = ours.forward_backward_custom(batch, loss).result(120)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_a_custom_loss_that_raises(client: ServiceClient) -> None:
    tc = new_run(client)
    future, step = tc.forward_backward_custom(datums(), lambda lp: 1 / 0), tc.optim_step()
    with pytest.raises(ZeroDivisionError):
        future.result(120)
    with pytest.raises(WindowPoisonedError):
        step.result(120)
    batch = datums()
    assert tc.forward_backward_custom(batch, numpy_cross_entropy(batch)).result(120)
    assert tc.optim_step().result(120).step == 1


def test_the_asyncio_twin(plugged: LocalService) -> None:
    async def main() -> None:
        async with AsyncServiceClient(plugged.target, api_key=plugged.api_key) as client:
            assert {loss.name for loss in await client.losses()} >= BUILT_IN
            tc = await client.create_training_client({"model_ref": "tiny", "seed": 4})
            batch = datums()
            passed = tc.forward_backward_custom(batch, numpy_cross_entropy(batch))
            stepped = tc.optim_step()
            assert (await passed).metrics["mine"] == 7
            assert (await stepped).step == 1

    asyncio.run(main())


REFUSED: dict[str, tuple[dict[str, Any], type[TenSafeError], str]] = {
    "an unknown loss": ({"loss_fn": "pp0"}, UnsupportedOptionError, "loss.name"),
    "an unknown option": (
        {"loss_config": {"clip_low": 0.8}},
        UnsupportedOptionError,
        "loss.options.clip_low",
    ),
    "an option out of range": (
        {"loss_fn": "ppo", "loss_config": {"clip_low": 1.5}},
        InvalidArgumentError,
        "loss.options.clip_low",
    ),
    "an option of a wrong type": (
        {"loss_fn": "kl", "loss_config": {"direction": True}},
        InvalidArgumentError,
        "loss.options.direction",
    ),
    "a missing input": ({"loss_fn": "ppo"}, BatchError, "loss_inputs"),
    "a reduction that it lacks": (
        {"loss_fn": "dpo", "reduction": "token_mean"},
        UnsupportedOptionError,
        "loss.reduction",
    ),
    "a reference without effect": (
        {"loss_config": {"reference": "base"}},
        UnsupportedOptionError,
        "loss.reference",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_its_field_and_the_run_goes_on(
    client: ServiceClient, case: str
) -> None:
    arguments, error, field = REFUSED[case]
    tc = new_run(client)
    with pytest.raises(error) as caught:
        tc.forward_backward(datums(), **arguments).result(120)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.violations[0][0].endswith(field)
    with pytest.raises(WindowPoisonedError):
        tc.optim_step().result(120)
    tc.forward_backward(datums())
    assert tc.optim_step().result(120).step == 1


def test_an_unknown_input_is_refused(client: ServiceClient) -> None:
    tc = new_run(client)
    with pytest.raises(BatchError, match="'logprobs' is unknown to cross_entropy"):
        tc.forward(sampled(), "cross_entropy").result(120)


def test_pairs_come_in_pairs(client: ServiceClient) -> None:
    tc = new_run(client)
    with pytest.raises(BatchError, match="2 by 2, and the batch has 3"):
        tc.forward(datums()[:3], "dpo").result(120)


def test_one_window_has_one_reduction(client: ServiceClient) -> None:
    tc = new_run(client)
    tc.forward_backward(datums())
    with pytest.raises(MixedReductionError, match="token_mean reduction and cannot take sequence"):
        tc.forward_backward(datums(), "dpo").result(120)


def test_a_reference_of_another_model_is_refused(client: ServiceClient) -> None:
    artifact = new_run(client).save_state().artifact_id
    tc = new_run(client, model_ref="twin")
    with pytest.raises(ArtifactMismatchError, match="on its own model"):
        tc.forward(datums(), "kl", loss_config={"reference": artifact}).result(120)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_of_many_losses_is_replayed(client: ServiceClient, deterministic: bool) -> None:
    """From its log, on a worker, with its reference and the gradients of its own losses."""
    teacher = new_run(client)
    teacher.forward_backward(datums())
    teacher.optim_step()
    artifact = teacher.save_state(include_optimizer=False).artifact_id
    tc = new_run(client, deterministic=deterministic)
    batch = datums(2)
    compared = {"kl_coef": 0.1, "entropy_coef": 0.01, "reference": artifact}
    for step in range(2):
        tc.forward_backward(sampled(step), "ppo", loss_config=compared)
        tc.forward_backward(datums(step), loss_config={"label_smoothing": 0.1})
        tc.optim_step()
        tc.forward_backward(datums(step), "dpo")
        tc.optim_step()
        tc.forward_backward_custom(batch, numpy_cross_entropy(batch))
        tc.optim_step()
    assert tc.optim_step().exception(120) is not None  # an empty window, which is replayed too
    report = client.verify_run(tc.run_id)
    assert report.reproduces, report.details
    assert report.replayed >= 12
    if deterministic:
        assert report.exact == report.replayed


def test_mock_has_two_losses_and_refuses_the_others(service: LocalService) -> None:
    with ServiceClient(service.target, api_key=service.api_key) as client:
        assert {loss.name for loss in client.losses()} == {"cross_entropy", "linear"}
        tc = client.create_training_client({"model_ref": "any"})
        with pytest.raises(UnsupportedOptionError, match="there is cross_entropy, linear"):
            tc.forward(sampled(), "ppo").result(60)
        batch = datums()
        result = tc.forward_backward_custom(batch, numpy_cross_entropy(batch)).result(60)
        assert (result.loss, result.metrics["mine"]) == (0.0, 7)
        assert tc.optim_step().result(60).step == 1


def test_results_are_json(client: ServiceClient, plugged: LocalService) -> None:
    tc = new_run(client)
    tc.forward_backward(sampled(), "gspo")
    tc.optim_step().result(120)
    lines = run_tensafe(plugged, "runs", "watch", tc.run_id, "--no-follow", "--json").stdout
    assert "approx_kl" in json.loads(lines.splitlines()[-1])["values"]
