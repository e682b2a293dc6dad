"""A run that comes into being on a dataset, and the dataset's end, at one moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tensafe.v1 import datasets_pb2 as datasets
from tensafe.v1 import training_pb2 as training
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe_client import DPConfig
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.runs import RunBook
from tensafe_server.privacy.accountant import Accountant
from tensafe_server.privacy.budgets import Budgets
from tensafe_server.privacy.config import PrivateConfigs
from tensafe_server.privacy.datasets import DatasetDesk
from tensafe_server.store.base import Page, TenantRow
from tensafe_server.store.sqlite import SqliteStore

DELETE = datasets.DeleteDatasetRequest(dataset_id="ds-1", request_id="delete-it")


class OneModel:
    """A registry that fills in what the run needs here."""

    def resolve_config(self, config: training.RunConfig) -> training.RunConfig:
        resolved = training.RunConfig(batch_size=8, gradient_accumulation_steps=1)
        resolved.MergeFrom(config)
        return resolved

    def find(self, reference: str) -> Model:
        return Model(name=reference)


class Parts:
    def __init__(self, store: SqliteStore, home: Path) -> None:
        self.store = store
        ledger, accountant = Ledger(), Accountant()
        self.desk = DatasetDesk(store, LocalBlobStore(home / "blobs"), ledger)
        configs = PrivateConfigs(self.desk, Budgets(store, accountant), accountant)
        self.runs = RunBook(store, ledger, OneModel(), configs)  # type: ignore[arg-type]
        self.close = accountant.close

    async def create(self) -> Any:
        dp = DPConfig(sampling="server_poisson", dataset_id="ds-1", noise_multiplier=1.0)
        config = training.RunConfig(model_ref="m", dp=dp.to_proto())
        request = training.CreateRunRequest(config=config, request_id="create-it")
        return await self.runs.create("ten-1", request)

    async def delete(self) -> Any:
        return await self.desk.delete("ten-1", DELETE)


def run_test(home: Path, body: Callable[[Parts], Awaitable[None]]) -> None:
    async def main() -> None:
        store = await SqliteStore.open(home / "store.db")
        await store.add_tenant(TenantRow("ten-1", "a", 1))
        await store.put_dataset("ten-1", datasets.Dataset(id="ds-1", examples=100))
        parts = Parts(store, home)
        await parts.desk.load()
        try:
            await body(parts)
        finally:
            parts.close()
            await store.close()

    asyncio.run(main())


def held(store: SqliteStore, name: str) -> tuple[asyncio.Event, asyncio.Event]:
    """(reached, go): a method of the store waits for the second when it is called."""
    reached, go = asyncio.Event(), asyncio.Event()
    method = getattr(store, name)

    async def waits(*args: Any) -> Any:
        reached.set()
        await go.wait()
        return await method(*args)

    setattr(store, name, waits)
    return reached, go


def test_a_dataset_stays_while_a_run_on_it_comes_into_being(tmp_path: Path) -> None:
    async def body(parts: Parts) -> None:
        reached, go = held(parts.store, "add_run")
        creating = asyncio.create_task(parts.create())
        await reached.wait()
        with pytest.raises(TenSafeFault, match="is being created") as caught:
            await parts.delete()
        assert caught.value.detail.reason == "DATASET_IN_USE"
        go.set()
        run = await creating
        with pytest.raises(TenSafeFault, match=f"run {run.id} draws from"):
            await parts.delete()

    run_test(tmp_path, body)


def test_no_run_comes_into_being_on_a_dataset_that_goes(tmp_path: Path) -> None:
    async def body(parts: Parts) -> None:
        reached, go = held(parts.store, "put_dataset")
        deleting = asyncio.create_task(parts.delete())
        await reached.wait()
        with pytest.raises(TenSafeFault) as caught:
            await parts.create()
        assert caught.value.detail.reason == "DATASET_NOT_FOUND"
        go.set()
        assert (await deleting).HasField("deleted_at")
        assert parts.runs.newest_first("ten-1", Page(10), deleted=True) == []

    run_test(tmp_path, body)


def test_a_dataset_that_could_not_be_deleted_is_there(tmp_path: Path) -> None:
    async def body(parts: Parts) -> None:
        async def fails(*args: Any) -> None:
            raise TenSafeFault("STORAGE_FULL", "no room")

        parts.store.put_dataset = fails  # type: ignore[method-assign]
        with pytest.raises(TenSafeFault, match="no room"):
            await parts.delete()
        assert (await parts.create()).private.server_poisson

    run_test(tmp_path, body)
