"""What was drawn for private steps: kept while a worker may ask for it, and told to nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tensafe.v1 import worker_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array
from tensafe_server.blobs.base import BlobStore
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import PendingOperation, RunState
from tensafe_server.privacy.datasets import DatasetDesk
from tensafe_server.privacy.drawing import draw
from tensafe_server.privacy.layout import DatasetFiles, DatasetReader
from tensafe_server.privacy.runs import PrivateRun, Units

_READERS_KEPT = 8


@dataclass(frozen=True, slots=True)
class Draw:
    """The units of one step, for one charge: whoever asks again gets the same."""

    charge_id: str
    units: Array


class Draws:
    """Draws batches when workers ask for them."""

    def __init__(self, blobs: BlobStore, ledger: Ledger, datasets: DatasetDesk) -> None:
        self._blobs = blobs
        self._datasets = datasets
        self._ledger = ledger
        self._draws: dict[str, Draw] = {}
        self._readers: dict[tuple[str, str, int, bool], DatasetReader] = {}
        self._drawing = asyncio.Lock()

    async def batches(
        self, request: pb.FetchPrivateBatchRequest
    ) -> AsyncIterator[pb.FetchPrivateBatchResponse]:
        """The rows that were drawn for a step that this worker has, in pieces of whole units.

        Raises:
            TenSafeFault: STALE_ASSIGNMENT; DATASET_NOT_FOUND.
        """
        operation, run, private = self._step(request)
        reader = await self._reader(run, private)
        chosen = await self._draw(operation, run, private, reader)
        pieces = reader.batches(chosen)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            batch, units = piece
            yield pb.FetchPrivateBatchResponse(batch=batch, units=units)

    def forget(self, operation_id: str) -> None:
        """The step has ended."""
        self._draws.pop(operation_id, None)

    def _step(
        self, request: pb.FetchPrivateBatchRequest
    ) -> tuple[PendingOperation, RunState, PrivateRun]:
        operation = self._ledger.pending(request.operation_id)
        run = self._ledger.runs.get(operation.row.run_id or "") if operation is not None else None
        charge = operation.charge if operation is not None else None
        if (
            operation is None
            or run is None
            or run.private is None
            or not run.private.server_poisson
            or operation.worker_id != request.worker_id
            or charge is None
            or charge.id != request.charge_id
        ):
            raise TenSafeFault(
                "STALE_ASSIGNMENT",
                f"{request.worker_id} has no private step {request.operation_id} under charge "
                f"{request.charge_id}",
                operation_id=request.operation_id,
            )
        return operation, run, run.private

    async def _draw(
        self,
        operation: PendingOperation,
        run: RunState,
        private: PrivateRun,
        reader: DatasetReader,
    ) -> Array:
        charge = operation.charge
        assert charge is not None
        async with self._drawing:
            drawn = self._draws.get(operation.row.id)
            if drawn is None or drawn.charge_id != charge.id:
                seed = None
                if run.config.dp.HasField("test_seed"):
                    seed = (run.config.dp.test_seed, f"{run.id}/{run.step}")
                rate = private.line.sample_rate or 0.0
                units = await asyncio.to_thread(draw, reader.count, rate, seed)
                drawn = self._draws[operation.row.id] = Draw(charge.id, units)
        return drawn.units

    async def _reader(self, run: RunState, private: PrivateRun) -> DatasetReader:
        by_unit = private.units is Units.UNIT_ID
        # Deleted and uploaded again, its rows may lie in another order under the same id.
        made_ns = self._datasets.find(run.tenant_id, private.dataset_id).created_at.ToNanoseconds()
        key = run.tenant_id, private.dataset_id, made_ns, by_unit
        if key not in self._readers:
            files = DatasetFiles(self._blobs, run.tenant_id, private.dataset_id)
            reader = await asyncio.to_thread(files.open, by_unit=by_unit)
            if len(self._readers) >= _READERS_KEPT:
                self._readers.pop(next(iter(self._readers)))
            self._readers[key] = reader
        return self._readers[key]
