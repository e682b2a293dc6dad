"""How services are put on the server.

The stubs name each method to the server twice: in a generic handler, and by itself. For each that
is named by itself grpc.aio keeps a task, and goes over all of these tasks whenever a call comes.
With fifty methods that was a seventh of a bare echo's CPU time. The generic handlers serve the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc


class GenericHandlers:
    """Stands for a server where the stubs add a service to it."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Hands them on."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Leaves them out."""
