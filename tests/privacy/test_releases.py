"""What a private run takes, tells, saves and refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.tiny_runs import metric, request_of, rows_of, settings, tiny_llama
from privacy.private_runs import SGD, private, private_request

from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from workers.backend import NoisedFault
from workers.engine.base_model import freeze
from workers.engine.engine import TorchBackend
from workers.mock import MockBackend
from workers.operations import Batch, LossRequest, PrivateMetrics, RunSettings, StepRequest

BASE = freeze("tiny", tiny_llama())
STEP = StepRequest(charged=True)
ROWS = rows_of(4, [9, 17, 4, 12])
RAW = PrivateMetrics.RAW_TO_OWNER


def opened(run: RunSettings | None = None, **changes) -> TorchBackend:
    backend = TorchBackend([BASE], token_budget=1000)
    backend.open_run("run", private(run or settings(), noise_multiplier=1.0, **changes), None)
    return backend


def names(outcome) -> list[str]:
    return [metric.name for metric in outcome.metrics]


@pytest.fixture(params=["torch", "mock"])
def backend(request):
    if request.param == "torch":
        return opened()
    backend = MockBackend()
    backend.open_run("run", private(settings(), noise_multiplier=1.0), None)
    return backend


def reason(error: pytest.ExceptionInfo[TenSafeFault]) -> tuple[str, str | None]:
    return error.value.detail.reason, error.value.detail.metadata.get("field")


def test_nothing_raw_is_told(backend):
    outcome = backend.forward_backward("run", 1, private_request(ROWS))
    assert names(outcome) == ["tokens"]
    assert outcome.outputs == {}
    step = backend.optim_step("run", STEP)
    assert names(step) == ["grad_norm", "learning_rate"]
    assert step.release.num_clipped is None
    assert step.release.noised_loss is None
    with pytest.raises(TenSafeFault) as caught:
        backend.forward("run", private_request(ROWS))
    assert reason(caught) == ("UNSUPPORTED_OPTION", "dp.metrics")


def test_the_mock_says_that_it_adds_no_noise(backend):
    backend.forward_backward("run", 1, private_request(ROWS))
    noised = backend.optim_step("run", STEP).release.noise_applied
    assert noised is (backend.name == "torch")


def test_raw_metrics_are_told_to_owners_who_asked():
    backend = opened(metrics=RAW, max_grad_norm=0.05)
    request = private_request(ROWS, masked=2)
    outcome = backend.forward_backward("run", 1, request)
    assert names(outcome) == ["loss", "tokens", "scored_tokens"]
    plain = TorchBackend([BASE], token_budget=1000)
    plain.open_run("run", settings(), None)
    same = request_of(ROWS, masked=2, reduction=Reduction.SEQUENCE_MEAN)
    expected = plain.forward("run", same)
    np.testing.assert_allclose(outcome.logprobs, expected.logprobs, atol=1e-6)
    assert metric(outcome, "loss") == pytest.approx(metric(expected, "loss"), rel=1e-6)
    told = backend.forward("run", private_request(ROWS, masked=2))
    assert metric(told, "loss") == pytest.approx(metric(expected, "loss"), rel=1e-6)
    step = backend.optim_step("run", STEP)
    assert step.release.num_clipped == 4
    assert {"loss", "grad_norm", "tokens"} <= set(names(step))


def test_the_norm_that_is_told_is_that_of_the_noised_gradient():
    backend = opened(settings(optimizer=SGD), test_seed=9, expected_batch_size=2.0)
    backend.forward_backward("run", 1, private_request(ROWS))
    weights = backend._runs["run"].adapter.weights
    before = weights.detach().clone()
    step = backend.optim_step("run", STEP)
    moved = (before - weights.detach()).norm().item()
    assert step.grad_norm == pytest.approx(moved, rel=1e-4)
    assert step.grad_norm == metric(step, "grad_norm")
    noise_alone = (len(weights) ** 0.5) / 2
    assert step.grad_norm == pytest.approx(noise_alone, rel=0.1)


def test_clipping_of_the_noised_gradient_is_the_optimizers():
    backend = opened(settings(optimizer=SGD | {"grad_clip_norm": 0.01}))
    backend.forward_backward("run", 1, private_request(ROWS))
    weights = backend._runs["run"].adapter.weights
    before = weights.detach().clone()
    step = backend.optim_step("run", STEP)
    assert step.grad_norm > 0.01
    assert (before - weights.detach()).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_noised_loss_is_a_clipped_sum_with_noise():
    """Of the units' losses: the mean of many releases is that of the clipped ones."""
    backend = opened(loss_noise_multiplier=0.5, max_loss=4.0, metrics=RAW, expected_batch_size=3.0)
    run = backend._runs["run"]
    outcome = backend.forward_backward("run", 1, private_request(ROWS, [0, 0, 1, 2]))
    losses = [metric(backend.forward("run", private_request([row])), "loss") for row in ROWS]
    clipped = min(4.0, losses[0] + losses[1]) + min(4.0, losses[2]) + min(4.0, losses[3])
    assert losses[0] + losses[1] > 4.0
    assert metric(outcome, "loss") == pytest.approx(np.mean(losses), rel=1e-5)
    assert run.private.losses == pytest.approx(clipped, rel=1e-5)
    found = []
    for _ in range(300):
        run.private.losses = clipped
        found.append(backend.optim_step("run", STEP).release.noised_loss)
    spread = 0.5 * 4.0 / 3.0
    assert np.mean(found) == pytest.approx(clipped / 3.0, abs=5 * spread / 300**0.5)
    assert np.std(found) == pytest.approx(spread, rel=5 / (2 * 300) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"loss": "ppo"}, "loss.name"),
        ({"loss": "dpo"}, "loss.name"),
        ({"reduction": Reduction.TOKEN_MEAN}, "loss.reduction"),
    ],
)
def test_what_mixes_examples_is_refused(backend, changes, field):
    with pytest.raises(TenSafeFault) as caught:
        backend.forward_backward("run", 1, replace(private_request(ROWS), **changes))
    assert reason(caught) == ("UNSUPPORTED_OPTION", field)
    with pytest.raises(TenSafeFault, match="forward_backward of this"):
        backend.optim_step("run", STEP)
    backend.forward_backward("run", 2, private_request(ROWS, reduction=Reduction.SUM))
    assert backend.optim_step("run", STEP).applied


@pytest.mark.parametrize("units", [[0, 1], [0, 1, 2, -2]])
def test_units_that_do_not_fit_are_refused(units):
    with pytest.raises(TenSafeFault) as caught:
        opened().forward_backward("run", 1, private_request(ROWS, units))
    assert reason(caught) == ("INVALID_BATCH", "batch.units")
    plain = TorchBackend([BASE], token_budget=1000)
    plain.open_run("run", settings(), None)
    with pytest.raises(TenSafeFault) as caught:
        plain.forward_backward("run", 1, private_request(ROWS, [0, 1, 2, 3]))
    assert reason(caught) == ("INVALID_BATCH", "batch.units")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"noise_multiplier": -1.0}, "dp.noise_multiplier"),
        ({"noise_multiplier": float("nan")}, "dp.noise_multiplier"),
        ({"max_grad_norm": 0.0}, "dp.max_grad_norm"),
        ({"expected_batch_size": float("inf")}, "dp.expected_batch_size"),
        ({"loss_noise_multiplier": 0.0}, "dp.loss_noise_multiplier"),
        ({"loss_noise_multiplier": 1.0, "max_loss": -1.0}, "dp.max_loss"),
    ],
)
def test_settings_that_bound_nothing_are_refused(changes, field):
    with pytest.raises(TenSafeFault) as caught:
        TorchBackend([BASE]).open_run("run", private(settings(), **changes), None)
    assert reason(caught) == ("INVALID_ARGUMENT", field)


def test_deterministic_runs_have_no_fresh_noise():
    with pytest.raises(TenSafeFault) as caught:
        opened(settings(deterministic=True))
    assert reason(caught) == ("UNSUPPORTED_OPTION", "deterministic")
    assert opened(settings(deterministic=True), test_seed=1)


def test_a_trained_tensor_without_a_rule_is_refused(monkeypatch):
    new_adapter = BASE.new_adapter

    def with_bias(lora):
        adapter = new_adapter(lora)
        adapter.slots[1] = replace(adapter.slots[1], key="base_model.model.lm_head.bias")
        return adapter

    monkeypatch.setattr(BASE, "new_adapter", with_bias)
    with pytest.raises(TenSafeFault, match=r"lm_head\.bias is trained without") as caught:
        opened()
    assert reason(caught) == ("UNSUPPORTED_OPTION", "dp.enabled")


def test_a_batch_in_which_nothing_counts_is_no_error(backend):
    unscored = private_request(ROWS)
    unscored.batch.weights = np.zeros_like(unscored.batch.weights)
    unscored.batch.target_tokens = np.full_like(unscored.batch.target_tokens, -100)
    outcome = backend.forward_backward("run", 1, unscored)
    assert names(outcome) == ["tokens"]
    used_up = private_request(ROWS, [-1, -1, -1, -1])
    assert names(backend.forward_backward("run", 2, used_up)) == ["tokens"]
    assert backend.optim_step("run", STEP).applied
    if backend.name == "torch":
        assert backend._runs["run"].accumulator is None
        backend.forward_backward("run", 3, used_up)
        assert not backend._runs["run"].accumulator.any()


@pytest.mark.parametrize("metrics", PrivateMetrics)
def test_an_empty_window_steps(metrics):
    backend = opened(metrics=metrics)
    step = backend.optim_step("run", STEP)
    assert (step.step, step.applied) == (1, True)
    assert step.grad_norm > 0
    assert "loss" not in names(step)


@pytest.mark.parametrize("metrics", PrivateMetrics)
def test_an_empty_batch_adds_nothing_and_is_no_error(backend, metrics):
    """As one that was drawn, and has nobody in it."""
    empty = LossRequest(
        Batch(
            np.zeros(1, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
            units=np.zeros(0, np.int32),
        )
    )
    backend.open_run("run", private(settings(), noise_multiplier=1.0, metrics=metrics), None)
    outcome = backend.forward_backward("run", 1, empty)
    assert metric(outcome, "tokens") == 0
    step = backend.optim_step("run", STEP)
    assert (step.step, step.applied) == (1, True)
    backend.forward_backward("run", 2, empty)
    backend.forward_backward("run", 3, private_request(ROWS))
    together = [("run", 4, empty), ("other", 1, empty)]
    backend.open_run("other", private(settings(), noise_multiplier=1.0), None)
    assert [metric(one, "tokens") for one in backend.forward_backward_group(together)] == [0, 0]
    assert backend.optim_step("run", STEP).step == 2
    assert backend.private_step("run", 5, [empty], STEP).step == 3
    backend.open_run("plain", settings(), None)
    with pytest.raises(TenSafeFault):
        backend.forward_backward("plain", 1, empty)


def test_a_step_after_the_last_one_costs_nothing():
    backend = opened(settings(max_steps=1))
    backend.optim_step("run", STEP)
    with pytest.raises(TenSafeFault, match="max_steps") as caught:
        backend.optim_step("run", STEP)
    assert not isinstance(caught.value, NoisedFault)


def test_a_step_that_fails_once_it_was_noised_is_spent():
    backend = opened(settings(optimizer=SGD | {"learning_rate": 1e38}), max_grad_norm=1e3)
    backend.forward_backward("run", 1, private_request(ROWS))
    before = backend._runs["run"].adapter.weights.detach().clone()
    with pytest.raises(NoisedFault) as caught:
        backend.optim_step("run", StepRequest(charged=True))
    assert reason(caught)[0] == "NON_FINITE_GRADIENT"
    run = backend._runs["run"]
    assert torch.equal(run.adapter.weights, before)
    assert run.accumulator is None
    assert backend.optim_step("run", StepRequest(learning_rate=0.1, charged=True)).step == 1


def test_no_update_is_made_without_a_charge(backend):
    backend.forward_backward("run", 1, private_request(ROWS))
    with pytest.raises(TenSafeFault, match="without a charge"):
        backend.optim_step("run", StepRequest())
    assert backend.optim_step("run", STEP).step == 1


def test_a_private_step_is_a_window_of_its_own(backend):
    """What was open is dropped, and a failure leaves nothing open."""
    backend.forward_backward("run", 1, private_request(ROWS))
    requests = [private_request(ROWS[:2]), private_request(ROWS[2:])]
    assert backend.private_step("run", 2, requests, STEP).step == 1
    assert backend.private_step("run", 3, [], STEP).step == 2
    with pytest.raises(TenSafeFault):
        backend.private_step("run", 4, [*requests, replace(requests[0], loss="ppo")], STEP)
    assert backend._runs["run"].window.backwards == 0
    assert backend.private_step("run", 5, requests, STEP).step == 3


def test_an_artifact_has_no_sum_without_noise(tmp_path):
    backend = opened(settings(accumulation_steps=2), metrics=RAW)
    backend.forward_backward("run", 1, private_request(ROWS))
    with pytest.raises(TenSafeFault) as caught:
        backend.save_state("run", tmp_path / "open", include_optimizer=True)
    assert reason(caught) == ("UNSUPPORTED_OPTION", "save_state.include_optimizer")
    (tmp_path / "weights").mkdir()
    backend.save_state("run", tmp_path / "weights", include_optimizer=False)
    backend.optim_step("run", STEP)
    backend.optim_step("run", STEP)
    (tmp_path / "closed").mkdir()
    backend.save_state("run", tmp_path / "closed", include_optimizer=True)
    files = sorted(path.name for path in (tmp_path / "closed").iterdir())
    assert files == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = json.loads((tmp_path / "closed" / "state.json").read_text())
    assert state["private"] == {"clipped": 0, "losses": 0.0}
    assert (state["window"]["loss_sum"], state["window"]["tokens"], state["backwards"]) == (0, 0, 0)


def test_a_run_that_comes_back_from_its_own_state_goes_on_with_its_window(tmp_path):
    """As after idling on the worker's disk; test noise shows that nothing else differs."""
    options = {"test_seed": 5, "loss_noise_multiplier": 1.0, "metrics": RAW, "max_grad_norm": 0.05}
    run = settings(accumulation_steps=2, lora={"dropout": 0.2})
    backend, calm = opened(run, **options), opened(run, **options)
    for each in (backend, calm):
        each.forward_backward("run", 1, private_request(ROWS[:2]))
        each.optim_step("run", STEP)
    backend.capture("run").write(tmp_path)
    restored = TorchBackend([BASE], token_budget=1000)
    settings_of_run = backend._runs["run"].settings
    restored.open_run("run", settings_of_run, tmp_path)
    for each in (restored, calm):
        each.forward_backward("run", 3, private_request(ROWS[2:]))
    steps = [each.optim_step("run", STEP) for each in (restored, calm)]
    assert steps[0].release == steps[1].release
    assert steps[0].release.num_clipped == 4
    assert steps[0].grad_norm == steps[1].grad_norm
    ours, theirs = (each._runs["run"].adapter.weights for each in (restored, calm))
    assert torch.equal(ours, theirs)


def test_a_private_run_takes_no_open_window_of_another(tmp_path):
    """Its gradient may be larger than any bound."""
    plain = TorchBackend([BASE], token_budget=1000)
    plain.open_run("run", settings(accumulation_steps=2), None)
    plain.forward_backward("run", 1, request_of(ROWS))
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        plain.save_state("run", tmp_path / name, include_optimizer=True)
        plain.optim_step("run", StepRequest())
        plain.optim_step("run", StepRequest()) if name == "open" else None
    backend = opened(settings(accumulation_steps=2))
    with pytest.raises(TenSafeFault, match="window is open") as caught:
        backend.load_state("run", tmp_path / "open", include_optimizer=True)
    assert reason(caught)[0] == "ARTIFACT_MISMATCH"
    assert backend.load_state("run", tmp_path / "closed", include_optimizer=True).step == 1
    backend.forward_backward("run", 1, private_request(ROWS))
    backend.load_state("run", tmp_path / "open", include_optimizer=False)
    assert backend._runs["run"].accumulator is None
    other = opened(settings(accumulation_steps=2), max_grad_norm=100.0)
    other.forward_backward("run", 1, private_request(ROWS))
    (tmp_path / "wider").mkdir()
    other.capture("run").write(tmp_path / "wider")
    with pytest.raises(TenSafeFault, match="window is open"):
        backend.load_state("run", tmp_path / "wider", include_optimizer=True)


def test_a_private_run_idles_on_disk_with_its_window_open():
    backend = TorchBackend([BASE], token_budget=1000, run_bytes=1)
    run = private(settings(), noise_multiplier=1.0)
    backend.open_run("run", run, None)
    backend.forward_backward("run", 1, private_request(ROWS))
    expected = backend._runs["run"].accumulator.clone()
    backend.open_run("other", settings(), None)
    assert backend._runs.resident == ["other"]
    assert torch.equal(backend._runs["run"].accumulator, expected)
    assert backend.optim_step("run", STEP).step == 1


def test_steps_of_private_and_plain_runs_are_made_together():
    backend = opened()
    backend.open_run("plain", settings(), None)
    requests = [("run", 1, private_request(ROWS)), ("plain", 1, request_of(ROWS))]
    backend.forward_backward_group(requests)
    private_step, plain_step = backend.optim_step_group([("run", STEP), ("plain", StepRequest())])
    assert private_step.release.noise_applied
    assert plain_step.release is None
    assert "loss" in names(plain_step)
