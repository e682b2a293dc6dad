"""A real store with one run, its blobs, and what keeps and prunes its past."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1.artifacts_pb2 import ArtifactFile
from tensafe_server.api.files import ArtifactUpload
from tensafe_server.blobs.local import LocalBlobStore
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.fleet.restore import Restorer
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import run_state
from tensafe_server.operations.pruning import Pruner
from tensafe_server.operations.snapshots import SnapshotBook, new_snapshot_id
from tensafe_server.privacy.parts import PrivacyParts
from tensafe_server.store.base import OperationRow, RunRow, TenantRow
from tensafe_server.store.sqlite import SqliteStore
from workers.transfers import file_chunks

Damage = Callable[[str], AbstractContextManager[None]]


def operation(seq: int, run: str = "run-1", **fields) -> OperationRow:
    """A forward_backward, not finished."""
    kind = fields.pop("kind", ops.OPERATION_KIND_FORWARD_BACKWARD)
    values = {
        "state": ops.OPERATION_STATE_QUEUED,
        "executed": False,
        "spec": training.OperationSpec(run_id=run, seq=seq).SerializeToString(),
        "spec_ref": None,
    } | fields
    return OperationRow(
        id=f"op-{run}-{seq}",
        tenant_id="ten-1",
        run_id=run,
        seq=seq,
        request_id=None,
        session_id="s",
        kind=kind,
        spec_hash=b"h",
        artifact_id=None,
        cost=1.0,
        created_ns=seq,
        **values,
    )


class Small:
    """One run of one tenant on worker wkr-1 under epoch 1."""

    def __init__(self, home: Path, store: SqliteStore, kept: int) -> None:
        self.home = home
        self.store = store
        self.blobs = LocalBlobStore(home / "blobs")
        self.payloads = Payloads(self.blobs)
        self.ledger = Ledger()
        self.book = SnapshotBook(store, self.blobs, self.ledger, kept)
        self.pruner = Pruner(store, self.blobs, self.payloads, self.ledger, self.book, 3600.0)
        self.privacy = PrivacyParts(store, self.blobs, self.payloads, self.ledger, self.book)
        self.restorer = Restorer(store, self.payloads, self.book, self.privacy.steps)
        row = RunRow("run-1", "ten-1", "m", b"", training.RUN_STATUS_ACTIVE, 0, 1, None, 0, 1)
        self.row = row
        self.run_state = run_state(row)
        self.run_state.worker_id = "wkr-1"
        self.ledger.runs["run-1"] = self.run_state

    @classmethod
    def run(cls, home: Path, body: Callable[[Small], Awaitable[None]], kept: int = 2) -> None:
        async def main() -> None:
            store = await SqliteStore.open(home / "store.db")
            try:
                small = cls(home, store, kept)
                await store.add_tenant(TenantRow("ten-1", "t", 1))
                await store.add_run(small.row)
                await body(small)
            finally:
                await store.close()

        asyncio.run(main())

    def settle(self, seq: int) -> None:
        """Everything up to here has ended."""
        self.run_state.next_seq = seq + 1

    async def upload(self, seq: int, content: bytes = b"0123456789" * 50) -> str | None:
        """A snapshot from the run's worker; returns why it was not kept."""
        source = self.home / "source"
        source.mkdir(exist_ok=True)
        (source / "data.bin").write_bytes(content)
        snapshot_id = new_snapshot_id()
        upload = ArtifactUpload(self.blobs, snapshot_id, "snapshots")
        for chunk in file_chunks(source / "data.bin"):
            await upload.take(chunk)
        files: list[ArtifactFile] = upload.files()
        header = pb.SnapshotHeader(worker_id="wkr-1", run_id="run-1", epoch=1, seq=seq, step=seq)
        if refusal := self.book.refusal(header):
            await self.book.remove_files(snapshot_id)
            return refusal
        return await self.book.keep(snapshot_id, header, files)

    def blob_keys(self) -> list[str]:
        return sorted(key for key, _ in self.blobs.sizes())

    def flip_bit(self, name: str) -> Damage:
        return self._damage(name, lambda data: bytes([data[0] ^ 1]) + data[1:])

    def truncate(self, name: str) -> Damage:
        return self._damage(name, lambda data: data[:-1])

    def remove(self, name: str) -> Damage:
        return self._damage(name, lambda data: None)

    def _damage(self, name: str, change: Callable[[bytes], bytes | None]) -> Damage:
        @contextmanager
        def damage(snapshot_id: str) -> Iterator[None]:
            path = self.home / "blobs" / "snapshots" / snapshot_id / name
            whole = path.read_bytes()
            changed = change(whole)
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
            yield
            path.write_bytes(whole)

        return damage
