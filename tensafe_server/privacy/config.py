"""A run's `dp_config`: what is left out filled in, what contradicts itself refused."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tensafe.v1 import privacy_pb2 as pb
from tensafe.v1 import training_pb2 as training
from tensafe.v1.datasets_pb2 import Dataset
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.model import RunState
from tensafe_server.operations.validation import refused
from tensafe_server.privacy.accountant import Accountant
from tensafe_server.privacy.accounting import (
    LEAST_SIGMA,
    UnsupportedCompositionError,
    check_supported,
)
from tensafe_server.privacy.budgets import Budgets
from tensafe_server.privacy.datasets import DatasetDesk
from tensafe_server.privacy.mechanisms import Composition
from tensafe_server.privacy.runs import PrivateRun, accountant_type, adjacency

_DEFAULTS: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "target_delta": 1e-5,
    "accountant_type": pb.DP_ACCOUNTANT_PLD,
    "sampling": pb.DP_SAMPLING_CLIENT_ATTESTED,
    "privacy_unit": pb.PRIVACY_UNIT_EXAMPLE,
    "adjacency": pb.DP_ADJACENCY_ADD_OR_REMOVE_ONE,
    "metrics": pb.DP_METRICS_MODE_PRIVATE,
}
_ENUMS = {"accountant_type", "sampling", "privacy_unit", "adjacency", "metrics"}
_MAX_LOSS = 10.0
_ROUNDING = 1e-9
"""A rate that is computed from a batch size, or the reverse, is off by what float64 rounds; what
differs by more was meant to be another number."""


@dataclass(frozen=True, slots=True)
class DatasetSize:
    """How many units an uploaded dataset has.

    Attributes:
        unit_ids: different unit ids; None if its rows have none.
    """

    examples: int
    unit_ids: int | None = None


class PrivateConfigs:
    """Fills in the `dp` of new runs."""

    def __init__(self, datasets: DatasetDesk, budgets: Budgets, accountant: Accountant) -> None:
        self._datasets = datasets
        self._budgets = budgets
        self._accountant = accountant

    async def resolve(
        self, tenant_id: str, given: training.RunConfig, resolved: training.RunConfig, model: Model
    ) -> None:
        """Fills in `resolved.dp`.

        Raises:
            TenSafeFault: INVALID_ARGUMENT for fields that are not enabled; what `resolve` and
                `Budgets.check_unit` raise; DATASET_NOT_FOUND; TOKEN_OUT_OF_RANGE or
                CONTEXT_EXCEEDED if the model cannot read the dataset.
        """
        if not given.HasField("dp"):
            return
        if not given.dp.enabled:
            _refuse_unused(given.dp)
            return
        dataset = None
        if given.dp.sampling == pb.DP_SAMPLING_SERVER_POISSON and given.dp.HasField("dataset_id"):
            found = self._datasets.find(tenant_id, given.dp.dataset_id)
            _check_readable(found, model)
            unit_ids = found.unit_ids if found.HasField("unit_ids") else None
            dataset = DatasetSize(found.examples, unit_ids)
        spent = await self._budgets.spent(tenant_id, given.dp.dataset_id)
        await resolve(given, resolved, dataset, spent, self._accountant)
        unit = PrivateRun.of("", resolved).line.unit
        await self._budgets.check_unit(tenant_id, resolved.dp.dataset_id, unit)

    def kept(self, tenant_id: str, config: training.RunConfig) -> AbstractContextManager[None]:
        """Keeps what a run with this configuration draws from, until it is there.

        Raises:
            TenSafeFault: DATASET_NOT_FOUND.
        """
        if config.dp.sampling != pb.DP_SAMPLING_SERVER_POISSON:
            return nullcontext()
        return self._datasets.kept(tenant_id, config.dp.dataset_id)

    def expected_tokens(self, run: RunState) -> float:
        """Tokens of a batch that the server draws, on average."""
        dp = run.config.dp
        dataset = self._datasets.known(run.tenant_id, dp.dataset_id)
        return dp.sample_rate * dataset.tokens if dataset is not None else 0.0


async def resolve(
    given: training.RunConfig,
    resolved: training.RunConfig,
    dataset: DatasetSize | None,
    spent: Composition,
    accountant: Accountant,
) -> None:
    """Fills in `resolved.dp`.

    Args:
        given: the run's configuration as it was sent.
        resolved: the same with every other default filled in.
        dataset: of server_poisson; None else.
        spent: what the dataset's ledger already has.

    Raises:
        TenSafeFault: INVALID_ARGUMENT, UNSUPPORTED_OPTION or DP_BUDGET_EXCEEDED.
    """
    dp = resolved.dp
    _fill(dp)
    _check_fields(given, dp)
    _fill_batch_size(given, resolved, dataset)
    try:
        check_supported(accountant_type(dp), adjacency(dp), PrivateRun.of("", resolved).sample_rate)
        if not dp.HasField("noise_multiplier"):
            await _fill_noise(resolved, spent, accountant)
    except UnsupportedCompositionError as error:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            f"config.dp.adjacency: {error}; choose add_or_remove_one or zero_out, or, on a dataset "
            "of which nothing was released under other parameters, the accountant pld",
            field="config.dp.adjacency",
        ) from error


def _refuse_unused(dp: pb.DpConfig) -> None:
    """What is not enabled has no effect, and may not look as if it had one."""
    names = [field.name for field, _ in dp.ListFields()]
    if names:
        rule = "has no effect without enabled; set that, or leave this out"
        raise refused((f"config.dp.{name}", rule) for name in names)


def _fill(dp: pb.DpConfig) -> None:
    for name, value in _DEFAULTS.items():
        if not (getattr(dp, name) if name in _ENUMS else dp.HasField(name)):  # type: ignore[arg-type]
            setattr(dp, name, value)
    if dp.HasField("loss_noise_multiplier") and not dp.HasField("max_loss"):
        dp.max_loss = _MAX_LOSS


def _check_fields(given: training.RunConfig, dp: pb.DpConfig) -> None:
    broken: dict[str, str] = {}
    poisson = dp.sampling == pb.DP_SAMPLING_SERVER_POISSON
    if not dp.HasField("dataset_id"):
        broken["dataset_id"] = (
            "is required: the uploaded dataset, `ds-…`"
            if poisson
            else "is required: a name for the data, the same for all runs on it, under which "
            "what they release adds up"
        )
    if poisson and dp.HasField("max_participation"):
        broken["max_participation"] = "is of client_attested; with server_poisson chance decides"
    if dp.HasField("max_loss") and not dp.HasField("loss_noise_multiplier"):
        broken["max_loss"] = "has no effect without loss_noise_multiplier"
    if dp.HasField("noise_multiplier"):
        if dp.noise_multiplier == 0 and dp.HasField("target_epsilon"):
            broken["noise_multiplier"] = "0 has no finite ε; leave target_epsilon out"
    elif not dp.HasField("target_epsilon"):
        broken["noise_multiplier"] = (
            "is required, or target_epsilon and max_steps, from which it is computed"
        )
    elif not given.HasField("max_steps"):
        broken["noise_multiplier"] = (
            "can be computed from target_epsilon only for a known max_steps; give either"
        )
    for name in ("noise_multiplier", "loss_noise_multiplier"):
        if 0 < getattr(dp, name) < LEAST_SIGMA:
            broken[name] = f"must be at least {LEAST_SIGMA:g}: less is no noise"
    if broken:
        raise refused((f"config.dp.{name}", rule) for name, rule in broken.items())


def _fill_batch_size(
    given: training.RunConfig, resolved: training.RunConfig, dataset: DatasetSize | None
) -> None:
    dp = resolved.dp
    usual = float(resolved.batch_size * resolved.gradient_accumulation_steps)
    if dataset is None:
        if not dp.HasField("expected_batch_size"):
            dp.expected_batch_size = usual
        return
    n = _units(dp, dataset)
    if dp.target_delta >= 1 / n:
        raise _refused(
            "target_delta",
            f"must be below 1/{n}, one over the dataset's units: else releasing one of them whole "
            "would be private",
        )
    if not dp.HasField("expected_batch_size"):
        chosen = given.HasField("batch_size") or given.HasField("gradient_accumulation_steps")
        by_rate = dp.HasField("sample_rate") and not chosen
        dp.expected_batch_size = dp.sample_rate * n if by_rate else usual
    if dp.expected_batch_size > n:
        raise _refused(
            "expected_batch_size", f"is {dp.expected_batch_size:g}, the dataset has {n} units"
        )
    if not dp.HasField("sample_rate"):
        dp.sample_rate = dp.expected_batch_size / n
    if not math.isclose(dp.sample_rate * n, dp.expected_batch_size, rel_tol=_ROUNDING):
        raise _refused(
            "sample_rate",
            f"{dp.sample_rate:g} of {n} units is {dp.sample_rate * n:.10g}, expected_batch_size is "
            f"{dp.expected_batch_size:.10g}; leave one of them out",
        )


def _units(dp: pb.DpConfig, dataset: DatasetSize) -> int:
    if dp.privacy_unit != pb.PRIVACY_UNIT_UNIT_ID:
        return dataset.examples
    if dataset.unit_ids is None:
        raise _refused(
            "privacy_unit",
            f"unit_id needs a dataset whose rows have a `unit_id`; those of {dp.dataset_id} have "
            "none",
        )
    return dataset.unit_ids


async def _fill_noise(
    resolved: training.RunConfig, spent: Composition, accountant: Accountant
) -> None:
    dp = resolved.dp
    dp.noise_multiplier = 1.0  # stands in: nothing that is read before it is computed depends on it
    private = PrivateRun.of("", resolved)
    steps = private.line.most_in_one_unit(resolved.max_steps)
    try:
        sigma = await accountant.noise_multiplier(
            dp.target_epsilon, steps, private.terms, private.sample_rate, spent
        )
    except UnsupportedCompositionError:
        raise
    except ValueError as error:
        raise TenSafeFault(
            "DP_BUDGET_EXCEEDED",
            f"{error}: ε {dp.target_epsilon:g} does not allow {steps} steps after what the ledger "
            f"of dataset {dp.dataset_id} has; raise target_epsilon, or lower max_steps",
            field="config.dp.target_epsilon",
            dataset_id=dp.dataset_id,
            max_epsilon=dp.target_epsilon,
        ) from error
    if not dp.HasField("loss_noise_multiplier"):
        dp.noise_multiplier = sigma
        return
    left = sigma**-2 - dp.loss_noise_multiplier**-2
    if left <= 0:
        raise _refused(
            "loss_noise_multiplier",
            f"{dp.loss_noise_multiplier:g} alone costs all of target_epsilon; it must be above "
            f"{sigma:.4g}",
        )
    dp.noise_multiplier = left**-0.5


def _check_readable(dataset: Dataset, model: Model) -> None:
    if model.vocabulary_size and dataset.largest_token >= model.vocabulary_size:
        raise TenSafeFault(
            "TOKEN_OUT_OF_RANGE",
            f"dataset {dataset.id} has token {dataset.largest_token}, the vocabulary of "
            f"{model.name} is 0 to {model.vocabulary_size - 1}; was another tokenizer used?",
            field="config.dp.dataset_id",
            token_id=dataset.largest_token,
            vocabulary_size=model.vocabulary_size,
        )
    if model.context_length and dataset.longest > model.context_length:
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"dataset {dataset.id} has a row of {dataset.longest} tokens, the context of "
            f"{model.name} is {model.context_length}; cut its rows and upload it again",
            field="config.dp.dataset_id",
            context_length=model.context_length,
        )


def _refused(name: str, rule: str) -> TenSafeFault:
    return refused([(f"config.dp.{name}", rule)])
