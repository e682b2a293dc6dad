"""ModelsService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from tensafe.v1 import models_pb2 as pb
from tensafe.v1 import models_pb2_grpc as rpc
from tensafe.wire.loss_messages import card_message
from tensafe.wire.losses import LossCard
from tensafe_server.api.files import tokenizer_chunks
from tensafe_server.blobs.base import BlobStore
from tensafe_server.models.registry import ModelRegistry


class ModelsServicer(rpc.ModelsServiceServicer):
    def __init__(self, models: ModelRegistry, blobs: BlobStore) -> None:
        self._models = models
        self._blobs = blobs

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=self._models.models())

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._models.find(request.model_ref))

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        model = self._models.find(request.model_ref)
        files = await asyncio.to_thread(self._models.tokenizer_files, model)
        async for chunk in tokenizer_chunks(self._blobs, files):
            yield pb.GetTokenizerResponse(chunk=chunk)

    async def ListLosses(
        self, request: pb.ListLossesRequest, context: Any
    ) -> pb.ListLossesResponse:
        if request.HasField("model_ref"):
            names = [self._models.find(request.model_ref).name]
        else:
            names = [model.name for model in self._models.models()]
        offered: dict[LossCard, list[str]] = {}
        for name in names:
            for card in self._models.losses(name).values():
                offered.setdefault(card, []).append(name)
        return pb.ListLossesResponse(
            losses=[
                pb.OfferedLoss(loss=card_message(card), models=offered[card])
                for card in sorted(offered, key=lambda card: card.name)
            ]
        )
