"""Differential privacy, as `create_training_client` takes it in `dp_config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensafe.v1 import privacy_pb2 as pb
from tensafe_client.checks import check_bool, check_count, check_number, check_string
from tensafe_client.errors import ConfigError
from tensafe_client.given import Given, present

_CHOICES: dict[str, dict[str, int]] = {
    "accountant_type": {"pld": pb.DP_ACCOUNTANT_PLD, "rdp": pb.DP_ACCOUNTANT_RDP},
    "sampling": {
        "server_poisson": pb.DP_SAMPLING_SERVER_POISSON,
        "client_attested": pb.DP_SAMPLING_CLIENT_ATTESTED,
    },
    "privacy_unit": {"example": pb.PRIVACY_UNIT_EXAMPLE, "unit_id": pb.PRIVACY_UNIT_UNIT_ID},
    "adjacency": {
        "add_or_remove_one": pb.DP_ADJACENCY_ADD_OR_REMOVE_ONE,
        "replace_one": pb.DP_ADJACENCY_REPLACE_ONE,
        "zero_out": pb.DP_ADJACENCY_ZERO_OUT,
    },
    "metrics": {
        "private": pb.DP_METRICS_MODE_PRIVATE,
        "raw_to_owner": pb.DP_METRICS_MODE_RAW_TO_OWNER,
    },
}
_NUMBERS = (
    "noise_multiplier",
    "max_grad_norm",
    "target_epsilon",
    "target_delta",
    "sample_rate",
    "expected_batch_size",
    "loss_noise_multiplier",
    "max_loss",
)
_COUNTS = ("max_participation", "test_seed")


@dataclass(frozen=True)
class DPConfig(Given):
    """Differential privacy of a run. What is not given, the server fills in (`Run.config`).

    Attributes:
        enabled: whether the run trains privately; without it no other field may be given.
        dataset_id: the ledger's key: the uploaded dataset, `ds-…`, or, for "client_attested", your
            own name for the data, the same for all runs on it.
        noise_multiplier: σ, standard deviation of the noise over max_grad_norm. Not given: computed
            from target_epsilon for max_steps.
        max_grad_norm: C, clipping bound of one unit's gradient, L2 norm; 1.
        target_epsilon: ε of the dataset's ledger that no step of this run may pass.
        target_delta: δ at which ε is stated; 1e-5.
        accountant_type: "pld" (the default, tight) or "rdp".
        sampling: "server_poisson" (the server draws each batch from an uploaded dataset) or
            "client_attested" (the default: ε makes no assumption about sampling).
        sample_rate: q, probability with which a unit is in a step's batch.
        expected_batch_size: units by which a step's noised sum is divided, whatever the batch has;
            batch_size × gradient_accumulation_steps.
        max_participation: steps in which one unit may be used; further uses add nothing.
            "client_attested" only.
        privacy_unit: "example" (the default) or "unit_id".
        adjacency: "add_or_remove_one" (the default), "replace_one" or "zero_out".
        metrics: "private" (the default: only what was noised) or "raw_to_owner".
        loss_noise_multiplier: noise on a step's sum of losses over max_loss; with it each step
            tells a noised mean loss, whose cost ε counts.
        max_loss: bound to which a unit's loss is clipped for that; 10.
        test_seed: for tests only; every report of the run then says that there is no privacy.
    """

    enabled: bool = True
    dataset_id: str | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    target_epsilon: float | None = None
    target_delta: float | None = None
    accountant_type: str | None = None
    sampling: str | None = None
    sample_rate: float | None = None
    expected_batch_size: float | None = None
    max_participation: int | None = None
    privacy_unit: str | None = None
    adjacency: str | None = None
    metrics: str | None = None
    loss_noise_multiplier: float | None = None
    max_loss: float | None = None
    test_seed: int | None = None

    def __post_init__(self) -> None:
        check_bool("DPConfig.enabled", self.enabled)  # None, too, would train without privacy
        self._check("dataset_id", check_string)
        for name in _NUMBERS:
            self._check(name, check_number)
        for name in _COUNTS:
            self._check(name, check_count, bits=64)
        for name, choices in _CHOICES.items():
            self._check(name, check_string)
            value = getattr(self, name)
            if value is not None and value not in choices:
                rule = f"must be {' or '.join(map(repr, choices))}, got {value!r}"
                raise ConfigError.of(f"DPConfig.{name}", rule)
        if not self.enabled:
            for name in self.given_fields():
                if name != "enabled" and getattr(self, name) is not None:
                    rule = "has no effect without enabled; set that, or leave this out"
                    raise ConfigError.of(f"DPConfig.{name}", rule)

    def to_proto(self) -> pb.DpConfig:
        """Packs the given fields, and `enabled` always: proto3 has no presence for it."""
        values: dict[str, Any] = {}
        for name, value in self.given_fields().items():
            if value is not None:
                values[name] = _CHOICES[name][value] if name in _CHOICES else value
        return pb.DpConfig(**values | {"enabled": self.enabled})

    @classmethod
    def from_proto(cls, message: pb.DpConfig) -> DPConfig:
        """Unpacks the set fields."""
        values = present(message, "dataset_id", *_NUMBERS, *_COUNTS)
        for name, choices in _CHOICES.items():
            names = {number: choice for choice, number in choices.items()}
            if getattr(message, name) in names:
                values[name] = names[getattr(message, name)]
        return cls(enabled=message.enabled, **values)
