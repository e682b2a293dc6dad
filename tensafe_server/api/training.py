"""TrainingService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from google.rpc.status_pb2 import Status

from tensafe.v1 import training_pb2 as pb
from tensafe.v1 import training_pb2_grpc as rpc
from tensafe.wire.status import TenSafeFault, from_status
from tensafe_server.api.guard import caller
from tensafe_server.api.pages import page, token
from tensafe_server.api.submit_streams import RequestStreams
from tensafe_server.events.hub import EventHub
from tensafe_server.fleet.cancel import Cancellation
from tensafe_server.fleet.dispatcher import Dispatcher
from tensafe_server.fleet.verify import Verifications
from tensafe_server.operations.gaps import GapWatch
from tensafe_server.operations.intake import Intake
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.lookup import OperationReader
from tensafe_server.operations.model import RunState
from tensafe_server.operations.pruning import Pruner
from tensafe_server.operations.runs import RunBook, run_message
from tensafe_server.operations.validation import check_rules
from tensafe_server.store.requests import uninterrupted


class TrainingServicer(rpc.TrainingServiceServicer):
    def __init__(
        self,
        runs: RunBook,
        ledger: Ledger,
        intake: Intake,
        reader: OperationReader,
        gaps: GapWatch,
        cancellation: Cancellation,
        dispatcher: Dispatcher,
        hub: EventHub,
        verifications: Verifications,
        pruner: Pruner,
        submitting: RequestStreams,
    ) -> None:
        self._submitting = submitting
        self._runs = runs
        self._ledger = ledger
        self._intake = intake
        self._reader = reader
        self._gaps = gaps
        self._cancellation = cancellation
        self._dispatcher = dispatcher
        self._hub = hub
        self._verifications = verifications
        self._pruner = pruner

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:
        run = await self._runs.create(caller().tenant_id, request)
        return pb.CreateRunResponse(run=run_message(run))

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        run = self._ledger.run(caller().tenant_id, request.run_id)
        return pb.GetRunResponse(run=run_message(run))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        wanted = page(request.page_size, request.page_token)
        tenant_id = caller().tenant_id
        found = self._runs.newest_first(tenant_id, wanted, deleted=request.include_deleted)
        return pb.ListRunsResponse(
            runs=[run_message(run) for run in found],
            next_page_token=token(wanted, len(found), found[-1].row.created_ns if found else 0),
        )

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:
        run = self._ledger.run(caller().tenant_id, request.run_id)
        await uninterrupted(self._delete(run, request))
        return pb.DeleteRunResponse(run=run_message(run))

    async def _delete(self, run: RunState, request: pb.DeleteRunRequest) -> None:
        await self._runs.delete(run, request)
        # All of it again with each request: the one before may have failed half way.
        await self._intake.settled()  # what was accepted before is cancelled too
        await self._cancellation.cancel_run(run)
        if not run.by_seq:  # else the worker is told when what it is at has ended
            self._dispatcher.release(run)
        self._hub.close_run(run.id)
        self._pruner.look_at(run)

    async def AttachRun(self, request: pb.AttachRunRequest, context: Any) -> pb.AttachRunResponse:
        run = self._ledger.run(caller().tenant_id, request.run_id)
        if run.deleted:
            raise TenSafeFault(
                "RUN_DELETED", f"run {run.id} was deleted; create a new one", run_id=run.id
            )
        await self._gaps.close(run)
        return pb.AttachRunResponse(run=run_message(run))

    async def VerifyRun(
        self, request: pb.VerifyRunRequest, context: Any
    ) -> AsyncIterator[pb.VerifyRunResponse]:
        run = self._ledger.run(caller().tenant_id, request.run_id)
        async with aclosing(self._verifications.verify(run)) as messages:
            async for message in messages:
                yield message

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:
        tenant_id = caller().tenant_id
        [outcome] = await self._intake.submit(tenant_id, [request.operation], request.session_id)
        if outcome.error is not None:
            raise _fault(outcome.error, outcome.operation_id)
        operation = await self._reader.operation(tenant_id, outcome.operation_id)
        return pb.SubmitResponse(operation=operation)

    async def SubmitBatch(
        self, request: pb.SubmitBatchRequest, context: Any
    ) -> pb.SubmitBatchResponse:
        return await self._submit(request)

    async def SubmitStream(
        self, requests: AsyncIterator[pb.SubmitStreamRequest], context: Any
    ) -> AsyncIterator[pb.SubmitStreamResponse]:
        async for request in self._submitting.each(requests):
            check_rules(request)
            yield pb.SubmitStreamResponse(batch=await self._submit(request.batch))

    async def _submit(self, request: pb.SubmitBatchRequest) -> pb.SubmitBatchResponse:
        outcomes = await self._intake.submit(
            caller().tenant_id, request.operations, request.session_id
        )
        return pb.SubmitBatchResponse(
            outcomes=[
                pb.SubmitOutcome(
                    operation_id=outcome.operation_id,
                    error=outcome.error,
                    repeated=outcome.repeated,
                )
                for outcome in outcomes
            ]
        )


def _fault(status: Status, operation_id: str) -> TenSafeFault:
    detail = from_status(status)
    metadata = {key: value for key, value in detail.metadata.items() if key != "field"}
    if operation_id:
        metadata["operation_id"] = operation_id
    return TenSafeFault(
        detail.reason,
        detail.message,
        violations=detail.violations,
        retry_delay_s=detail.retry_delay_s,
        **metadata,
    )
