"""The privacy report of a run, and the datasets that private runs draw from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from tensafe.v1 import datasets_pb2
from tensafe.v1 import privacy_pb2 as pb
from tensafe_client.given import present
from tensafe_client.results import enum_name, to_datetime

_ENUMS = {
    "adjacency": pb.DpAdjacency,
    "privacy_unit": pb.PrivacyUnit,
    "sampling": pb.DpSampling,
    "accountant": pb.DpAccountant,
    "accountant_used": pb.DpAccountant,
    "metrics": pb.DpMetricsMode,
}
_OPTIONAL = (
    "epsilon_if_poisson",
    "target_epsilon",
    "sample_rate",
    "loss_noise_multiplier",
    "max_participation",
    "steps_left",
    "dataset_units",
)
_LISTS = ("enforced", "attested", "caveats")


@dataclass(frozen=True)
class LedgerLine:
    """Releases of one kind in a dataset's ledger.

    Attributes:
        sampling: "server_poisson" or "client_attested".
        noise_multiplier: σ of all that a step has released together.
        sample_rate: q; only attested with "client_attested", None if not even that.
        run_id: the run, of "client_attested"; empty for all runs with "server_poisson".
        max_participation: steps that a unit was in at most; None without a bound.
        test_mode: the noise came from a seed that somebody knows.
        uses: charges that count: committed, lost, or not ended yet.
        privacy_unit: whose contribution was bounded: "example" or "unit_id".
    """

    sampling: str
    noise_multiplier: float
    sample_rate: float | None
    run_id: str
    max_participation: int | None
    test_mode: bool
    uses: int
    privacy_unit: str


@dataclass(frozen=True)
class PrivacyReport:
    """What a private run promises, and on what that stands; `print(report)` shows all of it.

    Attributes:
        run_id: the run.
        headline: what to read first.
        test_mode: no promise holds, since somebody may know the noise: of this run, or of another
            in the ledger.
        epsilon: ε of all that was released of the dataset, with no more assumed than was enforced.
        epsilon_if_poisson: ε had the batches been drawn as was attested; None if not in question.
        target_epsilon: the bound past which no step of this run has taken the ledger; None without
            one. Other runs have their own, or none.
        delta: δ of each ε.
        adjacency: what ε is about.
        privacy_unit: what is protected: "example" or "unit_id".
        sampling: who drew this run's batches.
        sampling_verified: whether the server drew all that counts itself: also for the others in
            the ledger.
        sample_rate: q; None if not even attested.
        noise_multiplier: σ of the gradient's noise.
        loss_noise_multiplier: σ of the loss's noise; None if no loss was released.
        max_grad_norm: C.
        expected_batch_size: units that each noised sum was divided by.
        max_participation: steps that a unit may be in; None without a bound.
        steps: private steps of this run that were committed.
        lost_steps: charges of this run that were spent without an update.
        steps_left: steps that it may still make; None without an end.
        accountant: the accountant that was asked for.
        accountant_used: the one by which epsilon was computed.
        accountant_version: library and version.
        rng: where noise and draws come from.
        metrics: what the owner was told.
        dataset_id: the ledger's key.
        dataset_sha256: the uploaded dataset's; empty with "client_attested".
        dataset_units: its units; None with "client_attested".
        lines: all that the ledger has, of all runs.
        ledger_entries: entries of the ledger.
        ledger_sha256: of its newest entry, which covers all before it.
        enforced: what the server has enforced.
        attested: what rests on the tenant's word.
        caveats: what this does not promise.
    """

    run_id: str
    headline: str
    test_mode: bool
    epsilon: float
    epsilon_if_poisson: float | None
    target_epsilon: float | None
    delta: float
    adjacency: str
    privacy_unit: str
    sampling: str
    sampling_verified: bool
    sample_rate: float | None
    noise_multiplier: float
    loss_noise_multiplier: float | None
    max_grad_norm: float
    expected_batch_size: float
    max_participation: int | None
    steps: int
    lost_steps: int
    steps_left: int | None
    accountant: str
    accountant_used: str
    accountant_version: str
    rng: str
    metrics: str
    dataset_id: str
    dataset_sha256: str
    dataset_units: int | None
    lines: tuple[LedgerLine, ...]
    ledger_entries: int
    ledger_sha256: str
    enforced: tuple[str, ...]
    attested: tuple[str, ...]
    caveats: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: pb.PrivacyReport) -> PrivacyReport:
        """Unpacks the message; without an ε it is infinite."""
        values: dict[str, Any] = {field.name: getattr(message, field.name) for field in fields(cls)}
        values |= {name: enum_name(kind, values[name]) for name, kind in _ENUMS.items()}
        values |= {name: tuple(values[name]) for name in _LISTS}
        values |= dict.fromkeys(_OPTIONAL) | present(message, *_OPTIONAL)
        values["epsilon"] = message.epsilon if message.HasField("epsilon") else math.inf
        values["lines"] = tuple(map(_line, message.lines))
        return cls(**values)

    def __str__(self) -> str:
        """The report as text, every item of it."""
        parts = [self.headline, ""]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("headline", "lines", *_LISTS):
                parts.append(f"{field.name.replace('_', ' '):<24}{_shown(value)}")
        parts.append("")
        parts.append("ledger lines:")
        parts += [f"  {_described(line)}" for line in self.lines] or ["  none"]
        for name in _LISTS:
            parts += ["", f"{name}:", *(f"  - {text}" for text in getattr(self, name))]
        return "\n".join(parts)


@dataclass(frozen=True)
class DatasetInfo:
    """An uploaded dataset.

    Attributes:
        id: `ds-…`, made of its content: also the key of its privacy ledger.
        name: free text for people.
        examples: rows.
        unit_ids: different unit ids; None if rows have none.
        tokens: tokens of all rows.
        longest: tokens of the longest row.
        largest_token: the largest token id.
        sha256: over the sorted sums of its rows.
        size_bytes: bytes that it takes.
        created_at: when it was uploaded.
    """

    id: str
    name: str
    examples: int
    unit_ids: int | None
    tokens: int
    longest: int
    largest_token: int
    sha256: str
    size_bytes: int
    created_at: datetime

    @classmethod
    def from_proto(cls, message: datasets_pb2.Dataset) -> DatasetInfo:
        """Unpacks a dataset."""
        return cls(
            id=message.id,
            name=message.name,
            examples=message.examples,
            unit_ids=message.unit_ids if message.HasField("unit_ids") else None,
            tokens=message.tokens,
            longest=message.longest,
            largest_token=message.largest_token,
            sha256=message.sha256,
            size_bytes=message.size_bytes,
            created_at=to_datetime(message.created_at),
        )


def _line(message: pb.LedgerLine) -> LedgerLine:
    optional = ("sample_rate", "max_participation")
    values: dict[str, Any] = dict.fromkeys(optional) | present(message, *optional)
    return LedgerLine(
        sampling=enum_name(pb.DpSampling, message.sampling),
        noise_multiplier=message.noise_multiplier,
        run_id=message.run_id,
        test_mode=message.test_mode,
        uses=message.uses,
        privacy_unit=enum_name(pb.PrivacyUnit, message.privacy_unit),
        **values,
    )


def _described(line: LedgerLine) -> str:
    parts = [
        f"{line.uses} of {line.sampling}",
        f"unit {line.privacy_unit}",
        f"noise multiplier {line.noise_multiplier:g}",
    ]
    if line.sample_rate is not None:
        attested = "" if line.sampling == "server_poisson" else " (attested)"
        parts.append(f"sample rate {line.sample_rate:g}{attested}")
    if line.max_participation is not None:
        parts.append(f"a unit in at most {line.max_participation}")
    if line.run_id:
        parts.append(line.run_id)
    return ", ".join([*parts, *["test mode"] * line.test_mode])


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
