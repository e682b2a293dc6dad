"""The privacy report: what was released, what that is worth, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tensafe.v1 import privacy_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RunState
from tensafe_server.privacy import accounting
from tensafe_server.privacy.budgets import Budgets
from tensafe_server.privacy.datasets import DatasetDesk
from tensafe_server.privacy.lines import Line, Lines, enforced
from tensafe_server.privacy.mechanisms import AccountantType
from tensafe_server.privacy.records import ReadLedger, check_whole, read_ledger
from tensafe_server.privacy.runs import PrivateRun, Units
from tensafe_server.store.base import Store
from tensafe_server.store.charges import GENESIS

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
_NO_PLD = (
    "no PLD can be computed of so much, or at so small a δ: ε is an upper bound, by RDP, or of the "
    "same without sampling"
)
_PRIVACY_UNITS = {"example": pb.PRIVACY_UNIT_EXAMPLE, "unit_id": pb.PRIVACY_UNIT_UNIT_ID}
_UNITS = {"example": "example", "unit_id": "unit"}
_HASHED = {"example": "its tokens", "unit_id": "its unit_id"}
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
        ledger = await read_ledger(self._store, run.tenant_id, private.dataset_id)
        check_whole(ledger.dataset_id, ledger.broken)
        return await self._made(run, private, ledger)

    async def _made(
        self, run: RunState, private: PrivateRun, ledger: ReadLedger
    ) -> pb.PrivacyReport:
        # All of it is of these entries, whatever is added meanwhile.
        rows, lines = ledger.rows, ledger.lines
        cost = await self._budgets.exact_cost(private, lines)
        report = _configured(run, private)
        report.delta = private.terms.delta
        report.test_mode = any(line.test_mode for line in _all_lines(private, lines))
        report.sampling_verified = cost.sampling_verified
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
        report.headline = _headline(report, private, lines)
        return report

    def _any_raw(self, tenant_id: str, dataset_id: str) -> bool:
        """Whether a run on the dataset, also a deleted one, tells its owner what was not noised."""
        return any(
            run.private is not None and run.private.raw_metrics
            for run in self._ledger.runs.values()
            if run.tenant_id == tenant_id and run.config.dp.dataset_id == dataset_id
        )


def _all_lines(private: PrivateRun, lines: Lines) -> list[Line]:
    """The run's own, used or not, and every other that counts."""
    others = [line for line, uses in lines.items() if uses and line != private.line]
    return [private.line, *others]


def _configured(run: RunState, private: PrivateRun) -> pb.PrivacyReport:
    dp = run.config.dp
    report = pb.PrivacyReport(
        run_id=run.id,
        adjacency=dp.adjacency,
        privacy_unit=dp.privacy_unit,
        sampling=dp.sampling,
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
        privacy_unit=_PRIVACY_UNITS[line.unit],
    )
    if line.sample_rate is not None:
        message.sample_rate = line.sample_rate
    if line.max_participation is not None:
        message.max_participation = line.max_participation
    return message


def _explain(report: pb.PrivacyReport, private: PrivateRun, lines: Lines) -> None:
    unit = _UNITS[private.line.unit]
    report.enforced.append(
        f"each {unit} adds at most {report.max_grad_norm:g} (L2) to a step's sum, and to one sum a "
        "step; noise once a step; division by the expected batch size"
    )
    report.enforced.append(
        "every charge was in the ledger before its step was made, and counts if anything failed "
        "after that; the state after a step was stored before its result was told"
    )
    target = private.target_epsilon
    if target is not None:
        report.enforced.append(
            f"no step of this run has taken the ledger past ε {target:g}; other runs have bounds "
            "of their own, or none"
        )
    used = _all_lines(private, lines)
    drawn = [line for line in used if line.is_drawn]
    chosen = [line for line in used if not line.is_drawn]
    report.enforced.extend(
        dict.fromkeys(  # others may differ in their noise alone
            f"the server drew each batch itself, every {unit} with probability "
            f"{line.sample_rate:g}, and told nobody who was in it{_whose(line, private)}"
            for line in drawn
        )
    )
    for line in chosen:
        if line.max_participation is not None:
            report.enforced.append(
                f"each {unit} was in at most {line.max_participation} steps of run {line.run_id}, "
                f"by a keyed hash of {_HASHED[line.unit]}{_whose(line, private)}"
            )
    report.attested.extend(_attested(report, private, drawn=bool(drawn), chosen=chosen))
    report.caveats.extend([_FLOATING_POINT, _TUNING, _TIMING, _STORAGE])
    if drawn:
        report.caveats.append(_PUBLIC)
    spent = report.epsilon if report.HasField("epsilon") else math.inf
    if target is not None and not spent <= target:
        report.caveats.append(
            f"the ledger is past this run's target ε {target:g}: steps of other runs took it there"
        )
    if report.accountant_used != report.accountant:
        report.caveats.append(_MIXED if len(enforced(lines)) > 1 else _NO_PLD)


def _whose(line: Line, private: PrivateRun) -> str:
    return "" if line == private.line else " (other runs on this dataset)"


def _attested(
    report: pb.PrivacyReport, private: PrivateRun, *, drawn: bool, chosen: Sequence[Line]
) -> Iterator[str]:
    """What rests on the tenant's word, for all that counts.

    Args:
        drawn: whether any of it was drawn by the server.
        chosen: of what clients have chosen.
    """
    by_id = private.units is Units.UNIT_ID
    if chosen:
        yield (
            f"dataset_id: that all runs on this data name {report.dataset_id!r}; another name has "
            "another ledger"
        )
    if drawn:
        yield (
            "the dataset: that other datasets of the tenant do not hold the same data in another "
            "form"
        )
    if by_id:
        yield "unit ids: that all rows of one person have one unit_id"
    elif chosen:
        yield "examples: that near-duplicates, whose hashes differ, are not one and the same"
    if chosen:
        others = "" if private.line in chosen else " (of other runs on this dataset)"
        yield (
            f"choice of batches{others}: that which examples are in one was decided without a look "
            "at other examples, but at what was released with noise"
        )
        yield (
            f"batches{others}: that an example's tokens and weights were made of that example alone"
        )
    if private.line in chosen and private.line.sample_rate is not None:
        yield (
            "sampling: epsilon_if_poisson holds only if every batch was drawn by Poisson sampling "
            f"at {private.line.sample_rate:g}; the server has not seen that (sampling_verified: "
            "false)"
        )
    yield _NOTHING_ELSE


def _headline(report: pb.PrivacyReport, private: PrivateRun, lines: Lines) -> str:
    used = _all_lines(private, lines)
    if report.test_mode:
        return "privacy: none (test mode)"
    if any(line.noise_multiplier == 0 for line in used):
        return "privacy: none (no noise, ε is infinite)"
    if not report.HasField("epsilon"):
        return f"privacy: none (no finite ε can be told at δ = {report.delta:g})"
    unit = _UNITS[private.line.unit]
    about = f"{_ADJACENT[report.adjacency]} {unit}, over all runs on dataset {report.dataset_id}"
    text = f"privacy: ε = {report.epsilon:.4f} at δ = {report.delta:g} for {about}"
    if report.sampling_verified:
        return f"{text}; batches drawn by the server"
    if any(line.is_drawn for line in used):
        return f"{text}; batches drawn by the server in part, no assumption about the others"
    return f"{text}; no assumption about sampling"
