"""Asks the server what it has of a session's open operations, after the stream may have missed
something or the server may have lost something.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from tensafe.v1 import operations_pb2, training_pb2
from tensafe_client.backoff import Backoff
from tensafe_client.errors import (
    ClientClosedError,
    OperationNotFoundError,
    RunNotFoundError,
    TenSafeError,
    unexpected,
)
from tensafe_client.open_operations import Future, OpenOperations, lost_error

if TYPE_CHECKING:
    from tensafe_client.session import Session

_Ask = Callable[[Any], Coroutine[Any, Any, Any]]

_ASKED_AT_ONCE = 64


class Inquiry:
    """Asks, and ends what has ended or is lost; on the loop."""

    def __init__(self, session: Session, operations: OpenOperations) -> None:
        self._session = session
        self._operations = operations
        self._asking = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def reconcile(self) -> None:
        """Reads every open operation anew, after the stream lost its place."""
        await self._read_all(self._operations.acknowledged())

    async def find_lost(self) -> None:
        """Ends what the server, started anew, had accepted and does not have any more. A run of
        which it cannot say is asked for again, and holds up nothing else."""
        run_ids = list(self._operations.sequences)
        acknowledged = self._operations.acknowledged()
        others = [one for one in acknowledged if not one.seq or one.run_id not in run_ids]
        runs = (self._ask(self._find_lost_of, run_id) for run_id in run_ids)
        await asyncio.gather(self._read_all(others), *runs)

    async def _find_lost_of(self, run_id: str) -> None:
        acknowledged = self._operations.acknowledged()
        futures = [one for one in acknowledged if one.seq and one.run_id == run_id]
        # Noted before anything is asked: what is accepted meanwhile is there.
        accepted_seq = self._operations.sequences[run_id].accepted_seq
        next_seq = await self._next_seq(run_id)
        if next_seq <= accepted_seq:
            error = lost_error(f"what run {run_id} had from seq {max(1, next_seq)} on")
            self._operations.run_lost(run_id, error)
        await self._read_all([future for future in futures if future.seq >= next_seq])
        # Another client may have used the seqs of lost ones again. If the newest is there, so are
        # those that were accepted before it.
        there = [future for future in futures if future.seq < next_seq]
        for future in sorted(there, key=lambda future: future.seq, reverse=True):
            if await self._read_anew(future):
                return

    async def _next_seq(self, run_id: str) -> int:
        """What the server expects next of a run; 0 if it does not have the run."""
        stubs = await self._session.stubs()
        try:
            request = training_pb2.GetRunRequest(run_id=run_id)
            response = await self._call_in_turn(stubs.training.GetRun, request)
        except RunNotFoundError:
            return 0
        next_seq: int = response.run.next_seq
        return next_seq

    async def _read_all(self, futures: Sequence[Future]) -> None:
        await asyncio.gather(*(self._ask(self._read_anew, future) for future in futures))

    async def _read_anew(self, future: Future) -> bool:
        """Takes over what became of an operation; False if it is lost."""
        stubs = await self._session.stubs()
        request = operations_pb2.GetOperationRequest(operation_id=future.operation_id or "")
        try:
            response = await self._call_in_turn(stubs.operations.GetOperation, request)
        except OperationNotFoundError:
            self._operations.lost(future)
            return False
        if response.operation.HasField("finished_at"):
            self._operations.finished(response.operation)
        return True

    async def _ask(self, ask: _Ask, subject: Any) -> None:
        """Asks once, and again and again beside whoever waits for this if the server cannot say:
        nothing is lost by that."""
        try:
            await ask(subject)
        except ClientClosedError:
            raise
        except TenSafeError:
            self._session.spawn(self._insist(ask, subject))

    async def _insist(self, ask: _Ask, subject: Any) -> None:
        backoff = Backoff()
        while True:
            await asyncio.sleep(backoff.next_s())
            try:
                await ask(subject)
                return
            except ClientClosedError:
                return
            except TenSafeError:
                continue
            except Exception as error:  # nobody else would end what waits for this
                self._session.fail_all(unexpected("asking what the server has", error))
                return

    async def _call_in_turn(self, method: Any, request: Any) -> Any:
        async with self._asking:
            return await self._session.call(method, request)
