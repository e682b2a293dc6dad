"""The channel to a coordinator: connected once with a time limit, then kept by gRPC for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from tensafe.v1 import training_pb2
from tensafe.v1.admin_pb2_grpc import AdminServiceStub
from tensafe.v1.artifacts_pb2_grpc import ArtifactsServiceStub
from tensafe.v1.datasets_pb2_grpc import DatasetsServiceStub
from tensafe.v1.metrics_pb2_grpc import MetricsServiceStub
from tensafe.v1.models_pb2_grpc import ModelsServiceStub
from tensafe.v1.operations_pb2_grpc import OperationsServiceStub
from tensafe.v1.privacy_pb2_grpc import PrivacyServiceStub
from tensafe.v1.training_pb2_grpc import TrainingServiceStub
from tensafe.wire.channel import client_options
from tensafe.wire.tls import find_mismatch, open_channel
from tensafe_client.backoff import Backoff, retryable
from tensafe_client.connection import Connection
from tensafe_client.errors import ConnectionFailedError, TenSafeError, from_rpc_error

LONGEST_CONNECT_S = 10.0
"""The first connection fails after this or `timeout_s`, whichever is shorter."""

_SUBMIT_STREAM = "/tensafe.v1.TrainingService/SubmitStream"


class Stubs:
    """The services of one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.training = TrainingServiceStub(channel)
        self.operations = OperationsServiceStub(channel)
        self.metrics = MetricsServiceStub(channel)
        self.artifacts = ArtifactsServiceStub(channel)
        self.models = ModelsServiceStub(channel)
        self.datasets = DatasetsServiceStub(channel)
        self.privacy = PrivacyServiceStub(channel)
        self.admin = AdminServiceStub(channel)
        self.submit_stream: Any = channel.stream_stream(
            _SUBMIT_STREAM,
            request_serializer=None,  # the submitter joins serialized operations
            response_deserializer=training_pb2.SubmitStreamResponse.FromString,
        )


class Channel:
    """Calls to one coordinator; on the I/O loop."""

    def __init__(self, connection: Connection, check_open: Callable[[], None]) -> None:
        self.connection = connection
        self.metadata: tuple[tuple[str, str], ...] = ()
        if connection.api_key:
            self.metadata = (("authorization", f"Bearer {connection.api_key}"),)
        self._check_open = check_open
        self._channel: grpc.aio.Channel | None = None
        self._stubs: Stubs | None = None
        self._connecting = asyncio.Lock()

    async def stubs(self) -> Stubs:
        """Returns the stubs of a channel that was connected at least once.

        Raises:
            ConnectionFailedError: if nothing answers in time.
        """
        self._check_open()
        if self._stubs is None:
            async with self._connecting:
                if self._stubs is None:
                    self._stubs = await self._connect()
        return self._stubs

    async def call(self, method: Any, request: Any, *, timeout_s: float | None = None) -> Any:
        """Makes one unary call, repeated while that may help.

        Every call of the contract may be repeated: it reads, or it carries a request id.

        Args:
            method: a multi-callable of `stubs()`.
            request: its request.
            timeout_s: longest time with all repetitions, seconds. None: the connection's.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (timeout_s or self.connection.timeout_s)
        backoff = Backoff()
        while True:
            self._check_open()
            remaining = max(0.001, deadline - loop.time())
            try:
                return await method(request, timeout=remaining, metadata=self.metadata)
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
                delay_s = backoff.next_s(failure.retry_delay_s)
                if not retryable(error) or loop.time() + delay_s >= deadline:
                    raise self._explain(failure) from None
            await asyncio.sleep(delay_s)

    async def close(self) -> None:
        """Ends every call and the channel."""
        if self._channel is not None:
            await self._channel.close(None)

    async def _connect(self) -> Stubs:
        """Opens the channel and waits until it stands, so that a wrong target is found at once."""
        options = client_options()
        address = self.connection.address
        if address.is_loopback:
            options.append(("grpc.enable_http_proxy", 0))
        channel = open_channel(address, self.connection.authorities, options)
        limit_s = min(self.connection.timeout_s, LONGEST_CONNECT_S)
        try:
            async with asyncio.timeout(limit_s):
                await self._ready(channel)
        except TimeoutError:
            await channel.close(None)
            raise self.unreachable(f"within {limit_s:g} s") from None
        except ConnectionFailedError:
            await channel.close(None)
            raise
        self._channel = channel
        return Stubs(channel)

    async def _ready(self, channel: grpc.aio.Channel) -> None:
        """Waits until the channel stands; says at once if it never will because of TLS."""
        probed = False
        state = channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and not probed:
                probed = True
                address = self.connection.address
                found = await find_mismatch(address, self.connection.authorities)
                if found is not None:
                    raise ConnectionFailedError(
                        f"the server at {address.host_port} {found.problem}",
                        code="UNAVAILABLE",
                        metadata={"target": str(address)},
                        remedy=found.remedy,
                    )
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=True)

    def _explain(self, error: TenSafeError) -> TenSafeError:
        if error.code == "UNAVAILABLE" and not error.reason:
            return self.unreachable(f"within {self.connection.timeout_s:g} s ({error.message})")
        return error

    def unreachable(self, how: str) -> ConnectionFailedError:
        """Makes the error of a coordinator that does not answer; `how` ends the sentence."""
        remedy = "check the target and that the service runs"
        if self.connection.address.is_loopback:
            remedy = "start a service on this machine with `tensafe up`, or check the target"
        return ConnectionFailedError(
            f"no TenSafe coordinator answers at {self.connection.host_port} {how}",
            code="UNAVAILABLE",
            metadata={"target": self.connection.host_port},
            remedy=remedy,
        )
