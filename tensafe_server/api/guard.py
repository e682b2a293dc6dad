"""The gate in front of every RPC: who calls, is the request well-formed, how errors leave.

One interceptor does all three, so that no servicer can forget one of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from tensafe.v1 import admin_pb2 as admin
from tensafe.wire.status import TenSafeFault, to_status
from tensafe_server.operations.validation import check_rules
from tensafe_server.tenants.identity import KIND_NAMES, Identity, Principal
from tensafe_server.unexpected import unexpected

log = logging.getLogger(__name__)

_OPEN_PREFIXES = ("/grpc.health.v1.", "/grpc.reflection.")
_KINDS = {
    "AdminService": admin.KEY_KIND_ADMIN,
    "WorkerService": admin.KEY_KIND_WORKER,
}

_caller: ContextVar[Principal] = ContextVar("caller")


def caller() -> Principal:
    """Who makes the call that is being served."""
    return _caller.get()


def unauthenticated(problem: str) -> TenSafeFault:
    """The refusal of a call whose key is no good."""
    return TenSafeFault(
        "UNAUTHENTICATED",
        f"{problem}; send `authorization: Bearer ts_…` (TENSAFE_API_KEY, or a profile of "
        "`tensafe up`)",
    )


class _Malformed:
    """Stands in for a request that could not be parsed."""


@dataclass(frozen=True, slots=True)
class _Received:
    """A request, and how many bytes it came in."""

    message: Any
    size: int


class Guard(grpc.aio.ServerInterceptor):
    """Authenticates, checks declared rules, and maps exceptions to statuses.

    An exception without a reason becomes INTERNAL with an error id that the log has too; its text
    stays here.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._guarded: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method.startswith(_OPEN_PREFIXES):
            return handler
        if handler is None:
            return _unknown(method)
        try:
            # What serves the call runs in this task, and so finds it.
            _caller.set(self._authenticate(handler_call_details))
        except TenSafeFault as fault:
            return _refusing(handler, fault)
        guarded = self._guarded.get(method)
        if guarded is None:
            guarded = self._guarded[method] = _guarded(handler, method)
        return guarded

    def _authenticate(self, details: grpc.HandlerCallDetails) -> Principal:
        header = next(
            (value for key, value in details.invocation_metadata if key == "authorization"), ""
        )
        scheme, _, secret = str(header).partition(" ")
        principal = (
            self._identity.authenticate(secret.strip()) if scheme.lower() == "bearer" else None
        )
        if principal is None:
            problem = "the API key is unknown or revoked" if header else "no API key was sent"
            raise unauthenticated(problem)
        service = details.method.split("/")[1].rpartition(".")[2]
        needed = int(_KINDS.get(service, admin.KEY_KIND_TENANT))
        if principal.kind != needed:
            raise TenSafeFault(
                "PERMISSION_DENIED",
                f"{service} needs a key of kind {KIND_NAMES[needed]}, this one is of kind "
                f"{KIND_NAMES[principal.kind]}",
                service=service,
            )
        return principal


def _guarded(handler: Any, method: str) -> Any:
    serve = _streaming if handler.response_streaming else _unary
    inner = (
        handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
    )
    return _handler(handler, serve(inner, method), _tolerant(handler))


def _unary(inner: Any, method: str) -> Any:
    async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await inner(_checked(request), context)
        except Exception as error:
            await _abort(context, error, method)

    return serve


def _streaming(inner: Any, method: str) -> Any:
    async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        responses: Any = None
        try:
            responses = inner(_checked(request), context)
            async for response in responses:
                await _write(context, response)
        except Exception as error:
            await _abort(context, error, method)
        finally:
            if responses is not None:
                await responses.aclose()

    return serve


async def _write(context: grpc.aio.ServicerContext[Any, Any], response: Any) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        # The transport takes nothing any more: the caller is gone, and the news of it, which would
        # have cancelled us, is still on its way. There is nobody to tell and nothing to log.
        raise asyncio.CancelledError from error


def _checked(request: Any) -> Any:
    """The message of a request whose rules hold, or the messages of a stream as they come."""
    if not isinstance(request, _Received):
        return _well_formed(request)
    if isinstance(request.message, Message):
        check_rules(request.message, size=request.size)
    return _parsed(request.message)


async def _well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for message in requests:
        yield _parsed(message)


def _parsed(message: Any) -> Any:
    if isinstance(message, _Malformed):
        raise TenSafeFault(
            "INVALID_ARGUMENT", "the request is not a message of this method; update the stubs"
        )
    return message


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str
) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, TenSafeFault):
        error = unexpected(log, method, error)
    status = rpc_status.to_status(to_status(error.detail))
    await context.abort_with_status(status)


def _refusing(handler: Any, fault: TenSafeFault) -> Any:
    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _abort(context, fault, "")

    async def streaming(
        request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        await _abort(context, fault, "")
        yield

    serve = streaming if handler.response_streaming else unary
    return _handler(handler, serve, _tolerant(handler))


def _unknown(method: str) -> Any:
    fault = TenSafeFault(
        "UNIMPLEMENTED",
        f"this server has no method {method}; reflection lists those that it has",
        method=method,
    )

    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _abort(context, fault, method)

    return grpc.unary_unary_rpc_method_handler(refuse)


def _tolerant(handler: Any) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            message = handler.request_deserializer(data)
        except DecodeError:
            message = _Malformed()
        return message if handler.request_streaming else _Received(message, len(data))

    return parse


def _handler(handler: Any, serve: Any, parse: Callable[[bytes], Any]) -> Any:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(serve, parse, handler.response_serializer)
