"""DatasetsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from tensafe.v1 import artifacts_pb2
from tensafe.v1 import datasets_pb2 as pb
from tensafe.v1 import datasets_pb2_grpc as rpc
from tensafe_server.api.guard import caller
from tensafe_server.operations.validation import check_rules, refused
from tensafe_server.privacy.datasets import DatasetDesk


class DatasetsServicer(rpc.DatasetsServiceServicer):
    def __init__(self, datasets: DatasetDesk) -> None:
        self._datasets = datasets

    async def BeginDatasetUpload(
        self, request: pb.BeginDatasetUploadRequest, context: Any
    ) -> pb.BeginDatasetUploadResponse:
        return await self._datasets.begin(caller().tenant_id, request)

    async def UploadDatasetFile(
        self, requests: AsyncIterator[pb.UploadDatasetFileRequest], context: Any
    ) -> pb.UploadDatasetFileResponse:
        first = await anext(requests, None)
        if first is None or not first.part.HasField("start"):
            raise refused([("part.start", "must be the stream's first message")])
        check_rules(first)
        start = first.part.start
        received = await self._datasets.receive(caller().tenant_id, start, _chunks(requests))
        return pb.UploadDatasetFileResponse(received_bytes=received)

    async def FinishDatasetUpload(
        self, request: pb.FinishDatasetUploadRequest, context: Any
    ) -> pb.FinishDatasetUploadResponse:
        dataset = await self._datasets.finish(caller().tenant_id, request)
        return pb.FinishDatasetUploadResponse(dataset=dataset)

    async def GetDataset(
        self, request: pb.GetDatasetRequest, context: Any
    ) -> pb.GetDatasetResponse:
        dataset = self._datasets.find(caller().tenant_id, request.dataset_id)
        return pb.GetDatasetResponse(dataset=dataset)

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Any
    ) -> pb.ListDatasetsResponse:
        return pb.ListDatasetsResponse(datasets=self._datasets.all_of(caller().tenant_id))

    async def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: Any
    ) -> pb.DeleteDatasetResponse:
        dataset = await self._datasets.delete(caller().tenant_id, request)
        return pb.DeleteDatasetResponse(dataset=dataset)


async def _chunks(
    requests: AsyncIterator[pb.UploadDatasetFileRequest],
) -> AsyncIterator[artifacts_pb2.UploadFileRequest]:
    async for request in requests:
        if not request.part.HasField("chunk"):
            raise refused([("part.chunk", "must be in every message after the first")])
        check_rules(request)
        yield request.part
