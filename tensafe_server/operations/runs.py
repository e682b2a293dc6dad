"""Runs: made, read, deleted."""

from __future__ import annotations

import asyncio
import time

from tensafe.v1 import training_pb2 as training
from tensafe_server.events.translate import timestamp
from tensafe_server.ids import new_id
from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import RunState, run_state
from tensafe_server.privacy.config import PrivateConfigs
from tensafe_server.store.base import Page, RunRow, Store
from tensafe_server.store.requests import first_request, new_request, uninterrupted


class RunBook:
    """Creates and deletes runs."""

    def __init__(
        self, store: Store, ledger: Ledger, models: ModelRegistry, private: PrivateConfigs
    ) -> None:
        self._private = private
        self._store = store
        self._ledger = ledger
        self._models = models
        self._creating = asyncio.Lock()

    async def create(self, tenant_id: str, request: training.CreateRunRequest) -> RunState:
        """Makes a run, or gives the one that this request id made before.

        Raises:
            TenSafeFault: REQUEST_ID_CONFLICT, or what `ModelRegistry.resolve_config` and
                `PrivateConfigs.resolve` raise.
        """
        known = await first_request(self._store, tenant_id, request)
        if known is not None:
            return self._ledger.run(tenant_id, known.subject)
        config = self._models.resolve_config(request.config)
        model = self._models.find(config.model_ref)
        # Which may take its time, and needs nobody else to wait.
        await self._private.resolve(tenant_id, request.config, config, model)
        return await uninterrupted(self._create(tenant_id, request, config))

    async def _create(
        self, tenant_id: str, request: training.CreateRunRequest, config: training.RunConfig
    ) -> RunState:
        async with self._creating:
            known = await first_request(self._store, tenant_id, request)
            if known is not None:
                return self._ledger.run(tenant_id, known.subject)
            row = RunRow(
                id=new_id("run"),
                tenant_id=tenant_id,
                model=self._models.find(config.model_ref).name,
                config=config.SerializeToString(),
                status=training.RUN_STATUS_ACTIVE,
                step=0,
                epoch=0,
                base_artifact_id=None,
                base_seq=0,
                created_ns=time.time_ns(),
            )
            with self._private.kept(tenant_id, config):
                await self._store.add_run(row, new_request(tenant_id, request, row.id))
                run = run_state(row)
                self._ledger.runs[run.id] = run
            return run

    async def delete(self, run: RunState, request: training.DeleteRunRequest) -> None:
        """Marks a run as deleted; from now on it takes nothing.

        Raises:
            TenSafeFault: REQUEST_ID_CONFLICT.
        """
        if await first_request(self._store, run.tenant_id, request) is None:
            await self._store.set_run_status(run.id, training.RUN_STATUS_DELETED)
            run.status = training.RUN_STATUS_DELETED
            await self._store.remember(new_request(run.tenant_id, request, run.id))

    def newest_first(self, tenant_id: str | None, page: Page, *, deleted: bool) -> list[RunState]:
        """A page of a tenant's runs; None: of all tenants'. `deleted`: also those."""
        runs = [
            run
            for run in self._ledger.runs.values()
            if tenant_id in (None, run.tenant_id)
            and (deleted or not run.deleted)
            and (page.before is None or run.row.created_ns < page.before)
        ]
        runs.sort(key=lambda run: (run.row.created_ns, run.id), reverse=True)
        return runs[: page.size]


def run_message(run: RunState) -> training.Run:
    """A run as callers see it."""
    return training.Run(
        id=run.id,
        config=run.config,
        status=run.status,  # type: ignore[arg-type]
        step=run.step,
        next_seq=run.next_seq,
        created_at=timestamp(run.row.created_ns),
        replay_mismatches=run.replay_mismatches,
        snapshot_seq=run.snapshot_seq,
    )
