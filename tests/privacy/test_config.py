"""A private run's configuration: defaults, what is computed, and what contradicts itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tensafe.v1 import privacy_pb2 as pb
from tensafe.v1 import training_pb2 as training
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe_client import DPConfig
from tensafe_server.operations.validation import check_rules
from tensafe_server.privacy.accountant import Accountant
from tensafe_server.privacy.accounting import epsilon
from tensafe_server.privacy.config import DatasetSize, PrivateConfigs, resolve
from tensafe_server.privacy.mechanisms import Composition, Mechanism
from tensafe_server.privacy.runs import PrivateRun

THOUSAND = DatasetSize(1000, 200)


@pytest.fixture(scope="module")
def accountant() -> Iterator[Accountant]:
    accountant = Accountant()
    yield accountant
    accountant.close()


@pytest.fixture
def resolved(accountant: Accountant) -> Any:
    def make(
        dataset: DatasetSize | None = None,
        spent: Composition | None = None,
        run: dict[str, int] | None = None,
        **dp: Any,
    ) -> training.RunConfig:
        dp.setdefault("dataset_id", "corpus")
        given = training.RunConfig(model_ref="m", dp=DPConfig(**dp).to_proto(), **(run or {}))
        whole = training.RunConfig()
        whole.CopyFrom(given)
        for name, value in (("batch_size", 8), ("gradient_accumulation_steps", 1)):
            if not whole.HasField(name):  # type: ignore[arg-type]
                setattr(whole, name, value)
        asyncio.run(resolve(given, whole, dataset, spent or {}, accountant))
        return whole

    return make


def violations(fault: TenSafeFault) -> list[str]:
    return [field.removeprefix("config.dp.") for field, _ in fault.detail.violations]


def test_what_is_left_out_is_filled_in(resolved: Any) -> None:
    found = DPConfig.from_proto(resolved(noise_multiplier=1.0).dp).given_fields()
    assert found == {
        "enabled": True,
        "dataset_id": "corpus",
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "target_delta": 1e-5,
        "accountant_type": "pld",
        "sampling": "client_attested",
        "expected_batch_size": 8.0,
        "privacy_unit": "example",
        "adjacency": "add_or_remove_one",
        "metrics": "private",
    }


def test_the_expected_batch_is_that_of_a_window(resolved: Any) -> None:
    run = {"batch_size": 4, "gradient_accumulation_steps": 16}
    assert resolved(noise_multiplier=1.0, run=run).dp.expected_batch_size == 64


def test_what_was_given_stays(resolved: Any) -> None:
    dp = resolved(
        noise_multiplier=2.0,
        max_grad_norm=0.5,
        target_delta=1e-7,
        expected_batch_size=10.5,
        max_participation=3,
        sample_rate=0.25,
        loss_noise_multiplier=10.0,
    ).dp
    assert (dp.noise_multiplier, dp.max_grad_norm, dp.target_delta) == (2.0, 0.5, 1e-7)
    assert (dp.expected_batch_size, dp.max_participation, dp.sample_rate) == (10.5, 3, 0.25)
    assert dp.max_loss == 10.0


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dataset_id", {"dataset_id": None}),
        ("dataset_id", {"dataset_id": None, "sampling": "server_poisson"}),
        ("noise_multiplier", {"noise_multiplier": None}),
        ("noise_multiplier", {"noise_multiplier": None, "target_epsilon": 3.0}),
        ("noise_multiplier", {"noise_multiplier": 0.0, "target_epsilon": 3.0}),
        ("max_participation", {"max_participation": 3, "sampling": "server_poisson"}),
        ("noise_multiplier", {"noise_multiplier": 1e-300}),
        ("loss_noise_multiplier", {"loss_noise_multiplier": 1e-7}),
        ("max_loss", {"max_loss": 5.0}),
        ("target_delta", {"target_delta": 1e-3, "sampling": "server_poisson"}),
        (
            "sample_rate",
            {"sample_rate": 0.5, "expected_batch_size": 8, "sampling": "server_poisson"},
        ),
        (
            "sample_rate",
            {"sample_rate": 0.0084, "expected_batch_size": 8, "sampling": "server_poisson"},
        ),
        ("expected_batch_size", {"expected_batch_size": 1001, "sampling": "server_poisson"}),
    ],
)
def test_contradictions_are_refused_by_field(
    resolved: Any, field: str, changes: dict[str, Any]
) -> None:
    poisson = changes.get("sampling") == "server_poisson"
    changes = {"noise_multiplier": 1.0} | changes
    if changes.get("dataset_id", "") is None:
        changes["dataset_id"] = None
    with pytest.raises(TenSafeFault) as caught:
        resolved(THOUSAND if poisson else None, **changes)
    assert caught.value.detail.reason == "INVALID_ARGUMENT"
    assert violations(caught.value) == [field]


def test_all_that_is_wrong_is_named_at_once(resolved: Any) -> None:
    with pytest.raises(TenSafeFault) as caught:
        resolved(dataset_id=None, max_loss=1.0)
    assert violations(caught.value) == ["dataset_id", "max_loss", "noise_multiplier"]


@pytest.mark.parametrize(
    ("given", "run", "rate", "expected"),
    [
        ({}, {}, 0.008, 8.0),
        ({}, {"batch_size": 10, "gradient_accumulation_steps": 2}, 0.02, 20.0),
        ({"sample_rate": 0.05}, {}, 0.05, 50.0),
        ({"expected_batch_size": 100.0}, {"batch_size": 4}, 0.1, 100.0),
        ({"sample_rate": 0.05, "expected_batch_size": 50.0}, {}, 0.05, 50.0),
        ({"sample_rate": 0.05}, {"batch_size": 50}, 0.05, 50.0),
        ({"privacy_unit": "unit_id"}, {}, 0.04, 8.0),
        ({"sample_rate": 0.1 + 0.2, "expected_batch_size": 300.0}, {}, 0.3, 300.0),
    ],
)
def test_rate_and_expected_size_of_a_drawn_batch(
    resolved: Any, given: dict[str, Any], run: dict[str, int], rate: float, expected: float
) -> None:
    config = resolved(THOUSAND, run=run, noise_multiplier=1.0, sampling="server_poisson", **given)
    assert config.dp.sample_rate == pytest.approx(rate)
    assert config.dp.expected_batch_size == pytest.approx(expected)


def test_a_rate_that_contradicts_a_given_batch_size_is_refused(resolved: Any) -> None:
    with pytest.raises(TenSafeFault) as caught:
        resolved(
            THOUSAND,
            run={"batch_size": 8},
            noise_multiplier=1.0,
            sampling="server_poisson",
            sample_rate=0.05,
        )
    assert violations(caught.value) == ["sample_rate"]


def test_units_need_a_dataset_that_has_them(resolved: Any) -> None:
    with pytest.raises(TenSafeFault) as caught:
        resolved(
            DatasetSize(1000),
            noise_multiplier=1.0,
            sampling="server_poisson",
            privacy_unit="unit_id",
        )
    assert violations(caught.value) == ["privacy_unit"]


def test_noise_for_a_target(resolved: Any) -> None:
    config = resolved(
        DatasetSize(10_000),
        run={"max_steps": 1000, "batch_size": 100},
        target_epsilon=3.0,
        sampling="server_poisson",
    )
    assert config.dp.noise_multiplier == pytest.approx(0.8137, abs=5e-4)


def test_noise_for_a_target_counts_a_units_uses_not_steps(resolved: Any) -> None:
    config = resolved(run={"max_steps": 1000}, target_epsilon=1.828, max_participation=10)
    assert config.dp.noise_multiplier == pytest.approx(6.83, abs=5e-3)
    more = resolved(run={"max_steps": 5}, target_epsilon=1.828, max_participation=10)
    assert more.dp.noise_multiplier < config.dp.noise_multiplier


def test_noise_for_a_target_counts_what_others_have_released(resolved: Any) -> None:
    spent = {Mechanism(4.0): 20}
    config = resolved(spent=spent, run={"max_steps": 10}, target_epsilon=5.0)
    private = PrivateRun.of("run-1", config)
    whole = {**spent, private.line.mechanism: 10}
    assert 4.99 < epsilon(whole, private.terms) <= 5.0
    with pytest.raises(TenSafeFault) as caught:
        resolved(spent=spent, run={"max_steps": 10}, target_epsilon=1.0)
    assert caught.value.detail.reason == "DP_BUDGET_EXCEEDED"


def test_a_noised_loss_takes_its_part_of_the_target(resolved: Any) -> None:
    run = {"max_steps": 10}
    alone = resolved(run=run, target_epsilon=3.0)
    config = resolved(run=run, target_epsilon=3.0, loss_noise_multiplier=30.0)
    assert config.dp.noise_multiplier > alone.dp.noise_multiplier
    private = PrivateRun.of("run-1", config)
    assert 2.99 < epsilon({private.line.mechanism: 10}, private.terms) <= 3.0
    with pytest.raises(TenSafeFault) as caught:
        resolved(run=run, target_epsilon=3.0, loss_noise_multiplier=1.0)
    assert violations(caught.value) == ["loss_noise_multiplier"]


def test_what_is_not_enabled_is_refused_by_field(accountant: Accountant) -> None:
    """Options that are taken and do nothing look like privacy."""
    given = training.RunConfig(model_ref="m", dp=pb.DpConfig(noise_multiplier=1.0, test_seed=3))
    configs = PrivateConfigs(None, None, accountant)  # type: ignore[arg-type]
    with pytest.raises(TenSafeFault) as caught:
        asyncio.run(configs.resolve("ten-1", given, given, Model()))
    assert violations(caught.value) == ["noise_multiplier", "test_seed"]
    given.dp.CopyFrom(pb.DpConfig())
    asyncio.run(configs.resolve("ten-1", given, given, Model()))


def test_a_participation_that_no_store_can_count_is_refused() -> None:
    dp = pb.DpConfig(enabled=True, dataset_id="corpus", noise_multiplier=1.0)
    request = training.CreateRunRequest(config={"model_ref": "m", "dp": dp}, request_id="12345678")
    for fits, most in ((True, 2**53 - 1), (False, 2**53), (False, 2**63), (False, 2**64 - 1)):
        request.config.dp.max_participation = most
        if fits:
            check_rules(request)
            continue
        with pytest.raises(TenSafeFault) as caught:
            check_rules(request)
        assert violations(caught.value) == ["max_participation"]


def test_what_no_accountant_adds_up_is_refused_at_once(resolved: Any) -> None:
    with pytest.raises(TenSafeFault) as caught:
        resolved(
            THOUSAND,
            noise_multiplier=1.0,
            sampling="server_poisson",
            adjacency="replace_one",
            accountant_type="rdp",
        )
    assert caught.value.detail.reason == "UNSUPPORTED_OPTION"
    resolved(noise_multiplier=1.0, adjacency="replace_one", accountant_type="rdp")
