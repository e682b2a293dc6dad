"""The privacy report: what was released, what that is worth, and what it rests on."""

from __future__ import annotations

import math

from tensafe.v1 import privacy_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RunState
from tensafe_server.privacy import accounting
from tensafe_server.privacy.budgets import Budgets
from tensafe_server.privacy.datasets import DatasetDesk
from tensafe_server.privacy.lines import Line, Lines, enforced
from tensafe_server.privacy.mechanisms import AccountantType
from tensafe_server.privacy.runs import PrivateRun, Units
from tensafe_server.store.base import Store
from tensafe_server.store.charges import GENESIS, LedgerRow, first_break

_ADJACENT = {
    pb.DP_ADJACENCY_ADD_OR_REMOVE_ONE: "adding or removing one",
    pb.DP_ADJACENCY_REPLACE_ONE: "replacing one",
    pb.DP_ADJACENCY_ZERO_OUT: "leaving out what one adds",
}
_RNG = "operating system's CSPRNG, a fresh key for each step"
_FLOATING_POINT = (
    "floating point: noise is drawn in float64 and rounded to float32; not hardened against "
    "Mironov-type attacks on its lowest bits"
)
_TUNING = (
    "tuning not included: choosing hyperparameters or the best of several runs by looking at "
    "results on this data costs more than is counted here"
)
_TIMING = "timing: how long a step takes depends on its batch, and was not hidden"
_NOTHING_ELSE = (
    "other training: that neither the base model nor a state that this run began from or loaded "
    "was trained on this data outside of this ledger"
)
_PUBLIC = (
    "public: what is told of the dataset itself (its hash, how many units and tokens it has, its "
    "longest row and largest token), and the sample rate and noise that were computed from its "
    "size; ε does not cover them"
)
_RAW = (
    "raw metrics of a run on this dataset are told to its owner: neither they nor what was decided "
    "by looking at them is covered"
)
_MIXED = (
    "releases on this dataset differ in their parameters: added up by RDP, a valid filter also "
    "where parameters are chosen by looking at results"
)
_MUCH = "so much was released that no PLD can be computed: ε is an upper bound, by RDP"
_STORAGE = (
    "storage: uploads lie in the tenant's own folder with owner-only permissions, not encrypted; "
    "operators and workers see the data"
)


class Reports:
    """Makes reports."""

    def __init__(
        self, store: Store, ledger: Ledger, budgets: Budgets, datasets: DatasetDesk
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._budgets = budgets
        self._datasets = datasets

    async def report(self, run: RunState) -> pb.PrivacyReport:
        """Raises TenSafeFault UNSUPPORTED_OPTION for a run that is not private,
        CHECKSUM_MISMATCH if the ledger is not what was written."""
        private = run.private
        if private is None:
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"run {run.id} is not private: it was created without dp_config",
                field="run_id",
                run_id=run.id,
            )
        await self._store.flushed()
        rows = await self._store.ledger(run.tenant_id, private.dataset_id)
        broken = first_break(rows)
        if broken is not None:
            raise TenSafeFault(
                "CHECKSUM_MISMATCH",
                f"the ledger of dataset {private.dataset_id} is not what was written, from entry "
                f"{broken} on; restore the server's store from a backup, and tell the operator",
                dataset_id=private.dataset_id,
                position=broken,
            )
        return await self._made(run, private, rows)

    async def _made(
        self, run: RunState, private: PrivateRun, rows: list[LedgerRow]
    ) -> pb.PrivacyReport:
        lines = _uses(rows)
        cost = await self._budgets.exact_cost(run.tenant_id, private)
        report = _configured(run, private)
        report.delta = private.terms.delta
        report.test_mode = any(line.test_mode and uses for line, uses in lines.items())
        if math.isfinite(cost.total):
            report.epsilon = cost.total
        if cost.if_poisson is not None and math.isfinite(cost.if_poisson):
            report.epsilon_if_poisson = cost.if_poisson
        if cost.steps_left is not None:
            report.steps_left = cost.steps_left
        by_terms = accounting.is_exact(enforced(lines), private.terms)
        is_rdp = private.terms.accountant is AccountantType.RDP or not by_terms
        report.accountant_used = pb.DP_ACCOUNTANT_RDP if is_rdp else pb.DP_ACCOUNTANT_PLD
        report.accountant_version = accounting.version()
        report.rng = "a test seed" if private.line.test_mode else _RNG
        report.steps = sum(row.event == "commit" and row.run_id == run.id for row in rows)
        report.lost_steps = sum(row.event == "lose" and row.run_id == run.id for row in rows)
        report.lines.extend(_line(line, uses) for line, uses in lines.items() if uses)
        report.ledger_entries = len(rows)
        report.ledger_sha256 = rows[-1].sha256 if rows else GENESIS
        dataset = self._datasets.known(run.tenant_id, private.dataset_id)
        if private.server_poisson and dataset is not None:
            report.dataset_sha256 = dataset.sha256
            by_id = private.units is Units.UNIT_ID
            report.dataset_units = dataset.unit_ids if by_id else dataset.examples
        _explain(report, private, lines)
        if self._any_raw(run.tenant_id, private.dataset_id):
            report.caveats.append(_RAW)
        report.headline = _headline(report, private)
        return report

    def _any_raw(self, tenant_id: str, dataset_id: str) -> bool:
        """Whether a run on the dataset, also a deleted one, tells its owner what was not noised."""
        return any(
            run.private is not None and run.private.raw_metrics
            for run in self._ledger.runs.values()
            if run.tenant_id == tenant_id and run.config.dp.dataset_id == dataset_id
        )


def _uses(rows: list[LedgerRow]) -> dict[Line, int]:
    return {Line.from_json(row.line): row.uses for row in rows}


def _configured(run: RunState, private: PrivateRun) -> pb.PrivacyReport:
    dp = run.config.dp
    report = pb.PrivacyReport(
        run_id=run.id,
        adjacency=dp.adjacency,
        privacy_unit=dp.privacy_unit,
        sampling=dp.sampling,
        sampling_verified=private.server_poisson,
        noise_multiplier=dp.noise_multiplier,
        max_grad_norm=dp.max_grad_norm,
        expected_batch_size=dp.expected_batch_size,
        accountant=dp.accountant_type,
        metrics=dp.metrics,
        dataset_id=dp.dataset_id,
    )
    for name in ("target_epsilon", "sample_rate", "loss_noise_multiplier", "max_participation"):
        if dp.HasField(name):
            setattr(report, name, getattr(dp, name))
    return report


def _line(line: Line, uses: int) -> pb.LedgerLine:
    poisson = line.sampling == "server_poisson"
    message = pb.LedgerLine(
        sampling=pb.DP_SAMPLING_SERVER_POISSON if poisson else pb.DP_SAMPLING_CLIENT_ATTESTED,
        noise_multiplier=line.noise_multiplier,
        run_id=line.run_id,
        test_mode=line.test_mode,
        uses=uses,
    )
    if line.sample_rate is not None:
        message.sample_rate = line.sample_rate
    if line.max_participation is not None:
        message.max_participation = line.max_participation
    return message


def _explain(report: pb.PrivacyReport, private: PrivateRun, lines: Lines) -> None:
    unit = "unit" if private.units is Units.UNIT_ID else "example"
    report.enforced.append(
        f"each {unit} adds at most {report.max_grad_norm:g} (L2) to a step's sum, and to one sum a "
        "step; noise once a step; division by the expected batch size"
    )
    report.enforced.append(
        "every charge was in the ledger before its step was made, and counts if anything failed "
        "after that; the state after a step was stored before its result was told"
    )
    if private.target_epsilon is not None:
        report.enforced.append(f"no step was made that would pass ε {private.target_epsilon:g}")
    if private.server_poisson:
        report.enforced.append(
            f"the server drew each batch itself, every {unit} with probability "
            f"{report.sample_rate:g}, and told nobody who was in it"
        )
        if private.units is Units.UNIT_ID:
            report.attested.append("unit ids: that rows of one person have one unit_id")
        report.attested.append(
            "the dataset: that other datasets of the tenant do not hold the same data in another "
            "form"
        )
    else:
        _explain_attested(report, private)
    report.attested.append(_NOTHING_ELSE)
    report.caveats.extend([_FLOATING_POINT, _TUNING, _TIMING, _STORAGE])
    if private.server_poisson:
        report.caveats.append(_PUBLIC)
    if report.accountant_used != report.accountant:
        report.caveats.append(_MIXED if len(enforced(lines)) > 1 else _MUCH)


def _explain_attested(report: pb.PrivacyReport, private: PrivateRun) -> None:
    if private.line.max_participation is not None:
        report.enforced.append(
            f"each unit was in at most {private.line.max_participation} steps of this run, by a "
            "keyed hash of " + ("its unit_id" if private.units is Units.UNIT_ID else "its tokens")
        )
    report.attested.append(
        f"dataset_id: that all runs on this data name {report.dataset_id!r}; another name has "
        "another ledger"
    )
    report.attested.append(
        "unit ids: that one person has one unit_id"
        if private.units is Units.UNIT_ID
        else "examples: that near-duplicates, whose hashes differ, are not one and the same"
    )
    report.attested.append(
        "batches: that an example's tokens and weights were made of that example alone"
    )
    if private.line.sample_rate is not None:
        report.attested.append(
            "sampling: epsilon_if_poisson holds only if every batch was drawn by Poisson sampling "
            f"at {private.line.sample_rate:g}; the server has not seen that (sampling_verified: "
            "false)"
        )


def _headline(report: pb.PrivacyReport, private: PrivateRun) -> str:
    if report.test_mode or private.line.test_mode:
        return "privacy: none (test mode)"
    if not report.HasField("epsilon"):
        return "privacy: none (no noise, ε is infinite)"
    unit = "unit" if private.units is Units.UNIT_ID else "example"
    about = f"{_ADJACENT[report.adjacency]} {unit}, over all runs on dataset {report.dataset_id}"
    text = f"privacy: ε = {report.epsilon:.4f} at δ = {report.delta:g} for {about}"
    if private.server_poisson:
        return f"{text}; batches drawn by the server"
    return f"{text}; no assumption about sampling"
