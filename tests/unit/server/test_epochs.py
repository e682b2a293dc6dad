"""No worker is ever given an epoch that another one may hold."""

from __future__ import annotations

from pathlib import Path

from unit.server.small_store import Small

from tensafe_server.models.registry import ModelRegistry
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.recovery import recover


def test_a_restart_passes_over_epochs_that_a_kill_kept_from_the_disk(tmp_path: Path):
    async def body(small: Small) -> None:
        await small.store.set_run_epoch("run-1", small.run_state.begin_epoch())
        written = small.run_state.epoch
        # Given to workers, and lost with the process before the commit.
        lost = [small.run_state.begin_epoch() for _ in range(5)]
        ledger = Ledger()
        models = ModelRegistry(small.store, small.blobs)
        await recover(small.store, small.payloads, models, ledger, lambda operation: None)
        run = ledger.runs["run-1"]
        # A worker that holds the run under the epoch in the store still goes on with it.
        assert run.epoch == written
        first = run.begin_epoch()
        assert first > max(lost)
        assert run.begin_epoch() == first + 1

    Small.run(tmp_path, body)
