"""A private run, as its resolved configuration defines it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tensafe.v1 import privacy_pb2 as pb
from tensafe.v1 import training_pb2 as training
from tensafe_server.privacy.lines import Line
from tensafe_server.privacy.mechanisms import (
    AccountantType,
    Adjacency,
    Terms,
    joint_noise_multiplier,
)

_ADJACENCIES = {
    pb.DP_ADJACENCY_ADD_OR_REMOVE_ONE: Adjacency.ADD_OR_REMOVE_ONE,
    pb.DP_ADJACENCY_REPLACE_ONE: Adjacency.REPLACE_ONE,
    pb.DP_ADJACENCY_ZERO_OUT: Adjacency.ZERO_OUT,
}


class Units(StrEnum):
    """What is protected."""

    EXAMPLE = "example"
    UNIT_ID = "unit_id"


@dataclass(frozen=True, slots=True)
class PrivateRun:
    """What the coordinator must know of a private run at every step.

    Attributes:
        line: what its steps are counted with.
        terms: how its ε is stated.
        target_epsilon: what the dataset's ledger may not pass; None: it is only told.
        server_poisson: the server draws its batches.
        raw_metrics: its owner sees what was not noised.
        every_call_closes: each optim_step closes its window.
    """

    dataset_id: str
    line: Line
    terms: Terms
    target_epsilon: float | None
    units: Units
    server_poisson: bool
    raw_metrics: bool
    noise_multiplier: float
    every_call_closes: bool

    @property
    def sample_rate(self) -> float:
        """With which ε is computed."""
        return self.line.mechanism.sample_rate

    @classmethod
    def of(cls, run_id: str, config: training.RunConfig) -> PrivateRun:
        """Of a resolved configuration with `dp.enabled`."""
        dp = config.dp
        poisson = dp.sampling == pb.DP_SAMPLING_SERVER_POISSON
        loss = dp.loss_noise_multiplier if dp.HasField("loss_noise_multiplier") else None
        unit_ids = dp.privacy_unit == pb.PRIVACY_UNIT_UNIT_ID
        line = Line(
            sampling="server_poisson" if poisson else "client_attested",
            noise_multiplier=joint_noise_multiplier(dp.noise_multiplier, loss),
            sample_rate=dp.sample_rate if dp.HasField("sample_rate") else None,
            run_id="" if poisson else run_id,
            max_participation=dp.max_participation if dp.HasField("max_participation") else None,
            test_mode=dp.HasField("test_seed"),
            unit="unit_id" if unit_ids else "example",
        )
        return cls(
            dataset_id=dp.dataset_id,
            line=line,
            terms=Terms(dp.target_delta, accountant_type(dp), adjacency(dp)),
            target_epsilon=dp.target_epsilon if dp.HasField("target_epsilon") else None,
            units=Units.UNIT_ID if unit_ids else Units.EXAMPLE,
            server_poisson=poisson,
            raw_metrics=dp.metrics == pb.DP_METRICS_MODE_RAW_TO_OWNER,
            noise_multiplier=dp.noise_multiplier,
            every_call_closes=config.gradient_accumulation_steps <= 1,
        )


def accountant_type(dp: pb.DpConfig) -> AccountantType:
    """The accountant that a resolved configuration names."""
    is_rdp = dp.accountant_type == pb.DP_ACCOUNTANT_RDP
    return AccountantType.RDP if is_rdp else AccountantType.PLD


def adjacency(dp: pb.DpConfig) -> Adjacency:
    """The adjacency that a resolved configuration names."""
    return _ADJACENCIES[dp.adjacency]
