"""PrivacyService."""

from __future__ import annotations

from typing import Any

from tensafe.v1 import privacy_pb2 as pb
from tensafe.v1 import privacy_pb2_grpc as rpc
from tensafe_server.api.guard import caller
from tensafe_server.operations.ledger import Ledger
from tensafe_server.privacy.report import Reports


class PrivacyServicer(rpc.PrivacyServiceServicer):
    def __init__(self, ledger: Ledger, reports: Reports) -> None:
        self._ledger = ledger
        self._reports = reports

    async def GetPrivacyReport(
        self, request: pb.GetPrivacyReportRequest, context: Any
    ) -> pb.GetPrivacyReportResponse:
        run = self._ledger.run(caller().tenant_id, request.run_id)
        return pb.GetPrivacyReportResponse(report=await self._reports.report(run))
