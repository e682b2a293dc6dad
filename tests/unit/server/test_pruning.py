"""Pruning takes what nobody needs, and never what a recovery could need."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.server.small_store import Small, operation

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.artifacts_pb2 import Artifact, ArtifactFile
from tensafe.v1.types_pb2 import Metric, NamedTensor
from tensafe.wire.tensors import encode
from tensafe_server.operations import pruning
from tensafe_server.operations.model import run_state
from tensafe_server.store.base import Finish, RunUpdate

SUCCEEDED = ops.OPERATION_STATE_SUCCEEDED
BIG = b"x" * 100_000
ACTIONS = st.sampled_from(
    ["work", "snapshot", "snapshot", "prune", "prune", "artifact", "damage", "restart"]
)


class Simulation:
    """A run's life, and what a recovery at any moment of it would find."""

    def __init__(self, small: Small) -> None:
        self.small = small
        self.seq = 0

    async def work(self, count: int = 3) -> None:
        rows = []
        for _ in range(count):
            self.seq += 1
            spec = training.OperationSpec(run_id="run-1", seq=self.seq).SerializeToString()
            inline, ref = await self.small.payloads.save("ten-1", spec)
            if self.seq % 3 == 0:
                inline, ref = await self.small.payloads.save("ten-1", BIG)
            rows.append(
                operation(
                    self.seq,
                    state=SUCCEEDED,
                    executed=True,
                    spec=inline,
                    spec_ref=ref,
                    cursor=self.seq,
                    finished_ns=self.seq,
                )
            )
        await self.small.store.add_operations(rows)
        self.small.settle(self.seq)

    async def snapshot(self) -> None:
        await self.work(2)
        assert await self.small.upload(self.seq) is None

    async def artifact(self) -> None:
        run = self.small.run_state
        name = f"art-{self.seq}"
        self.small.blobs.put(f"artifacts/{name}/f", b"")
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        file = ArtifactFile(name="f", size_bytes=0, sha256=empty)
        artifact = Artifact(id=name, run_id=run.id, files=[file])
        if await self.small.store.artifact(None, name) is None:
            update = RunUpdate(run.id, 0, name, self.seq)
            finish = Finish([], artifacts=[("ten-1", artifact)], runs=[update])
            await self.small.store.finish(finish)
            run.base_artifact_id, run.base_seq = name, self.seq

    async def prune(self) -> None:
        await self.small.pruner.prune(self.small.run_state)

    async def damage(self) -> None:
        rows = await self.small.store.snapshots("run-1")
        if len(rows) > 1:
            path = self.small.home / "blobs" / "snapshots" / rows[0].id / "data.bin"
            path.write_bytes(b"torn")

    async def restart(self) -> None:
        [row] = await self.small.store.runs()
        run = run_state(row)
        run.worker_id, run.next_seq = "wkr-1", self.seq + 1
        run.epoch = 1
        newest = await self.small.store.newest_snapshots()
        run.snapshot_seq = newest.get("run-1", 0)
        self.small.run_state = run
        self.small.ledger.runs["run-1"] = run
        await self.small.pruner.sweep()

    async def check(self) -> None:
        """Recoveries from the newest point, and from the one before it, find all they need."""
        run = self.small.run_state
        point = await self.small.restorer.newest(run)
        await self.is_complete_after(point.seq)
        oldest = await self.small.restorer.oldest(run, "")
        await self.is_complete_after(oldest.seq)
        rows = await self.small.store.snapshots("run-1")
        if len(rows) > 1:
            with ExitStack() as stack:
                stack.enter_context(self.small.truncate("data.bin")(rows[0].id))
                intact = [row for row in rows if await self.small.book.is_intact(row)]
                assert intact
                await self.is_complete_after(intact[0].seq)

    async def is_complete_after(self, seq: int) -> None:
        run = self.small.run_state
        found = [op async for op in self.small.restorer.history(run, seq, 1)]
        assert [op.operation_id for op in found] == [
            f"op-run-1-{number}" for number in range(seq + 1, self.seq + 1)
        ]
        assert all(op.spec for op in found)


@settings(max_examples=25, deadline=None)
@given(st.lists(ACTIONS, min_size=10, max_size=20))
def test_no_recovery_ever_misses_anything(actions):
    async def body(small: Small) -> None:
        simulation = Simulation(small)
        for name in actions:
            await getattr(simulation, name)()
            await simulation.check()

    with tempfile.TemporaryDirectory() as home:
        Small.run(Path(home), body)


def test_specs_go_only_when_enough_snapshots_are_newer(tmp_path: Path):
    async def body(small: Small) -> None:
        simulation = Simulation(small)
        await simulation.work(4)
        await simulation.snapshot()
        assert await small.pruner.prune(small.run_state) == 0
        await simulation.work(4)
        await simulation.snapshot()
        before = [key for key in small.blob_keys() if key.startswith("payloads/")]
        assert await small.pruner.prune(small.run_state) == 6
        after = [key for key in small.blob_keys() if key.startswith("payloads/")]
        assert (len(before), len(after)) == (4, 2)
        rows = await small.store.history("run-1", 0, 100)
        assert [row.spec is None and row.spec_ref is None for row in rows] == [True] * 6 + [
            False
        ] * 6
        assert [row.state for row in rows] == [SUCCEEDED] * 12
        assert await small.pruner.prune(small.run_state) == 0

    Small.run(tmp_path, body)


async def finish_with_result(small: Small, seq: int, finished_ns: int) -> None:
    result = ops.OperationResult()
    result.forward_backward.metrics.append(Metric(name="loss", value=2.5))
    tensor = encode(np.zeros(30_000, np.float32))
    result.forward_backward.outputs.append(NamedTensor(name="logprobs", tensor=tensor))
    inline, ref = await small.payloads.save("ten-1", result.SerializeToString())
    row = operation(
        seq, state=SUCCEEDED, executed=True, cursor=seq, finished_ns=finished_ns, result=inline
    )
    row.result_ref = ref
    await small.store.add_operations([row])
    small.settle(seq)


def test_results_past_their_retention_keep_their_metrics(tmp_path: Path):
    async def body(small: Small) -> None:
        now = time.time_ns()
        await finish_with_result(small, 1, now - int(3601e9))
        await finish_with_result(small, 2, now - int(3500e9))
        assert await small.pruner.prune_old_results() == 1
        old, young = await small.store.history("run-1", 0, 10)
        assert (bool(old.result_pruned), bool(young.result_pruned)) == (True, False)
        left = ops.OperationResult.FromString(await small.payloads.load(old.result, None))
        assert left.forward_backward.metrics[0].value == 2.5
        assert not left.forward_backward.outputs
        assert small.blob_keys() == [young.result_ref]
        assert await small.pruner.prune_old_results() == 0

    Small.run(tmp_path, body)


def test_a_result_whose_file_is_away_waits_for_a_later_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pruning, "_BATCH", 2)

    async def body(small: Small) -> None:
        old = time.time_ns() - int(3601e9)
        for seq in range(1, 6):
            await finish_with_result(small, seq, old)
        rows = await small.store.history("run-1", 0, 10)
        away = {}
        for row in rows[0:3:2]:
            away[row.result_ref] = small.blobs.get(row.result_ref)
            small.blobs.delete(row.result_ref)
        assert await small.pruner.prune_old_results() == 3
        for ref, data in away.items():
            small.blobs.put(ref, data)
        assert await small.pruner.prune_old_results() == 2
        for row in await small.store.history("run-1", 0, 10):
            left = ops.OperationResult.FromString(await small.payloads.load(row.result, None))
            assert left.forward_backward.metrics[0].value == 2.5
        assert small.blob_keys() == []

    Small.run(tmp_path, body)


def test_nothing_goes_while_a_runs_past_is_read(tmp_path: Path):
    async def body(small: Small) -> None:
        simulation = Simulation(small)
        for _ in range(3):
            await simulation.snapshot()
        small.run_state.pinned = 1
        assert await small.pruner.prune(small.run_state) == 0
        assert len(await small.store.snapshots("run-1")) == 3
        small.run_state.pinned = 0
        assert await small.pruner.prune(small.run_state) == 4
        assert len(await small.store.snapshots("run-1")) == 2

    Small.run(tmp_path, body)


def test_a_deleted_run_leaves_rows_only(tmp_path: Path):
    async def body(small: Small) -> None:
        simulation = Simulation(small)
        await simulation.work(5)
        await simulation.snapshot()
        await finish_with_result(small, 8, time.time_ns() - 1)
        small.run_state.status = training.RUN_STATUS_DELETED
        await small.pruner.prune(small.run_state)
        assert small.blob_keys() == []
        rows = await small.store.history("run-1", 0, 100)
        assert len(rows) == 8
        assert not any(row.spec or row.spec_ref for row in rows)
        assert await small.store.snapshots("run-1") == []

    Small.run(tmp_path, body)


def test_blobs_that_no_row_names_are_swept_and_no_others(tmp_path: Path):
    async def body(small: Small) -> None:
        simulation = Simulation(small)
        await simulation.work(1)
        await simulation.snapshot()
        await simulation.artifact()
        saving = operation(9, kind=ops.OPERATION_KIND_SAVE_STATE)
        saving.artifact_id = "art-coming"
        await small.store.add_operations([saving])
        small.blobs.put("artifacts/art-coming/f", b"half")
        small.blobs.put("tokenizers/m/t.json", b"{}")
        named = small.blob_keys()
        small.blobs.put("artifacts/art-nobody/f", b"x")
        small.blobs.put("snapshots/snap-nobody/data.bin", b"x")
        await small.payloads.save("ten-1", BIG)
        small.blobs.writer("payloads/ten-1/aa/torn").write(b"half")
        assert await small.pruner.sweep() == 4
        assert small.blob_keys() == named
        assert not [path for path in (tmp_path / "blobs").rglob(".*") if path.is_file()]

    Small.run(tmp_path, body)
