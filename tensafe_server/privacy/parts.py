"""The parts that private runs need, put together for the coordinator."""

from __future__ import annotations

from tensafe_server.blobs.base import BlobStore
from tensafe_server.blobs.payloads import Payloads
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.snapshots import SnapshotBook
from tensafe_server.privacy.accountant import Accountant
from tensafe_server.privacy.budgets import Budgets
from tensafe_server.privacy.config import PrivateConfigs
from tensafe_server.privacy.datasets import DatasetDesk
from tensafe_server.privacy.draws import Draws
from tensafe_server.privacy.outcomes import PrivateOutcomes
from tensafe_server.privacy.report import Reports
from tensafe_server.privacy.steps import PrivateSteps
from tensafe_server.store.base import Store


class PrivacyParts:
    """Accounting and the ledgers, what prepares steps, and what ends them."""

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        payloads: Payloads,
        ledger: Ledger,
        snapshots: SnapshotBook,
    ) -> None:
        self._ledger = ledger
        self._snapshots = snapshots
        self.accountant = Accountant()
        self.budgets = Budgets(store, self.accountant)
        self.datasets = DatasetDesk(store, blobs, ledger)
        self.reports = Reports(store, ledger, self.budgets, self.datasets)
        self.draws = Draws(blobs, ledger, self.datasets)
        self.configs = PrivateConfigs(self.datasets, self.budgets, self.accountant)
        self.steps = PrivateSteps(store, payloads, self.budgets)
        self.outcomes = PrivateOutcomes(ledger, self.budgets, self.steps, snapshots, self.draws)

    async def load(self) -> None:
        """Takes up what a crash has left: charges that are open, and states that wait for their
        commit. The ledger of operations must have been recovered."""
        await self.datasets.load()
        charges = await self.steps.load(self._ledger.pending)
        await self._snapshots.load(charges)

    def close(self) -> None:
        self.accountant.close()
