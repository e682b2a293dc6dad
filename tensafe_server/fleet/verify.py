"""Verifying a run: its log is replayed on a worker beside the run itself, and compared.

The worker gets a run of its own to apply the operations to, so that the verified one is not
touched. A few operations are sent at a time: between them the worker goes on with its other work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from tensafe.v1 import training_pb2 as training
from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.fleet.dispatcher import Dispatcher
from tensafe_server.fleet.link import WorkerLink
from tensafe_server.fleet.replay import Comparer, Lineage
from tensafe_server.fleet.restore import Restorer, settled_seq
from tensafe_server.ids import new_id
from tensafe_server.operations.model import RunState
from tensafe_server.operations.outcomes import as_error

_AHEAD = 4
_MOST_DETAILS = 100
_EPOCH = 1


@dataclass(slots=True)
class _Check:
    """One verification that goes on: what its worker has told and nobody has looked at yet."""

    link: WorkerLink
    news: asyncio.Queue[pb.OperationDone | TenSafeFault] = field(default_factory=asyncio.Queue)


class Verifications:
    """Replays runs to compare them with their logs.

    Args:
        on_unpinned: called with a run whose past may be pruned again.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        restorer: Restorer,
        comparer: Comparer,
        on_unpinned: Callable[[RunState], None],
    ) -> None:
        self._dispatcher = dispatcher
        self._restorer = restorer
        self._comparer = comparer
        self._checks: dict[str, _Check] = {}
        self._on_unpinned = on_unpinned

    def take(self, link: WorkerLink, done: pb.OperationDone) -> bool:
        """Takes a replayed outcome in; False if it is not one of a verification's."""
        check = self._checks.get(done.run_id)
        if check is not None and check.link is link:
            check.news.put_nowait(done)
        return done.run_id.startswith("check-")

    def refused(self, link: WorkerLink, refused: pb.RefusedSnapshot) -> bool:
        """Takes in that the copy of a run could not be taken on; False if it is none of a
        verification's."""
        check = self._checks.get(refused.run_id)
        if check is not None and check.link is link:
            detail = as_error(refused.error)
            reason = "RUN_STATE_LOST" if refused.snapshot_id else detail.reason
            check.news.put_nowait(TenSafeFault(reason, detail.message))
        return refused.run_id.startswith("check-")

    def lost(self, link: WorkerLink) -> bool:
        """Ends the verifications of a worker that is gone; says whether there were any."""
        ended = [check for check in self._checks.values() if check.link is link]
        for check in ended:
            check.news.put_nowait(
                TenSafeFault(
                    "NO_WORKER", "the worker was lost that verified the run; verify it again"
                )
            )
        return bool(ended)

    async def verify(self, run: RunState) -> AsyncGenerator[training.VerifyRunResponse, None]:
        """Yields progress, then the report.

        Raises:
            TenSafeFault: RUN_DELETED, NO_WORKER, RUN_STATE_LOST; UNSUPPORTED_OPTION for a private
                run; why the worker could not take its copy on, such as OUT_OF_MEMORY.
        """
        if run.deleted:
            raise TenSafeFault(
                "RUN_DELETED", f"run {run.id} was deleted, and its log with it", run_id=run.id
            )
        if run.private is not None:
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"run {run.id} is private: its noise was drawn once and is not kept, so that "
                "nothing can give its steps again; `tensafe privacy report` has its ledger's hash",
                field="run_id",
                run_id=run.id,
            )
        link = self._free_worker(run)
        await self._restorer.settled(run)
        end = settled_seq(run)
        check_id = new_id("check")
        check = _Check(link)
        self._checks[check_id] = check
        try:
            async with run.past_kept():
                point = await self._restorer.oldest(run, link.instance)
                assignment = point.assignment(run, check_id, _EPOCH)
                assignment.check = True
                link.send_plan(pb.Plan(runs=[assignment]))
                report = training.VerifyReport(
                    from_seq=point.seq, pruned=run.pruned_seq > 0, to_seq=end
                )
                total = max(0, end - point.seq)
                lineage = Lineage.of(run, link)
                operations = self._restorer.history(run, point.seq, _EPOCH, end)
                async for done in self._replayed(check, check_id, operations):
                    await self._compare(run, report, lineage, done)
                    progress = training.VerifyProgress(
                        replayed=report.replayed, total=max(total, report.replayed)
                    )
                    yield training.VerifyRunResponse(progress=progress)
            yield training.VerifyRunResponse(report=report)
        finally:
            del self._checks[check_id]
            link.send(pb.ConnectResponse(release=pb.ReleaseRun(run_id=check_id)))
            self._on_unpinned(run)

    def _free_worker(self, run: RunState) -> WorkerLink:
        able = [
            link
            for link in self._dispatcher.links
            if run.model in link.models and not link.draining and not link.closed
        ]
        if not able:
            raise TenSafeFault(
                "NO_WORKER",
                f"no worker that serves {run.model} is connected; start one, and verify again",
                model=run.model,
            )
        return min(able, key=lambda link: (len(link.outstanding), len(link.runs), link.id))

    async def _replayed(
        self, check: _Check, check_id: str, operations: AsyncIterator[pb.PlannedOperation]
    ) -> AsyncIterator[pb.OperationDone]:
        """Sends operations, a few ahead, and yields what came of each that is replayed."""
        ahead, more = 0, True
        while more or ahead:
            while more and ahead < _AHEAD:
                planned = await anext(operations, None)
                if planned is None:
                    more = False
                    break
                planned.run_id = check_id
                check.link.send_plan(pb.Plan(operations=[planned]))
                ahead += not planned.void
            if ahead:
                news = await check.news.get()
                if isinstance(news, TenSafeFault):
                    raise news
                ahead -= 1
                yield news

    async def _compare(
        self,
        run: RunState,
        report: training.VerifyReport,
        lineage: Lineage,
        done: pb.OperationDone,
    ) -> None:
        report.replayed += 1
        row = await self._comparer.row(run.tenant_id, done.operation_id)
        if row is None:
            raise RuntimeError(f"operation {done.operation_id} is not in the log")
        exact = lineage.pass_by(row)
        if exact:
            report.exact += 1
        else:
            report.within_tolerance += 1
        difference = await self._comparer.difference(row, done, exact)
        if difference is None:
            return
        report.mismatches += 1
        if len(report.details) < _MOST_DETAILS:
            report.details.add(operation_id=row.id, seq=row.seq or 0, difference=difference)
