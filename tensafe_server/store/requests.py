"""Idempotency of mutations that are not numbered operations."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from google.protobuf.message import Message

from tensafe.wire.status import TenSafeFault
from tensafe_server.store.base import RequestRow, Store

_T = TypeVar("_T")


async def uninterrupted(mutation: Coroutine[Any, Any, _T]) -> _T:
    """Runs a mutation to its end even if its caller goes away, so that what is on disk and what is
    in memory stay the same."""
    return await asyncio.shield(asyncio.ensure_future(mutation))


async def first_request(store: Store, scope: str, request: Message) -> RequestRow | None:
    """The record of an earlier call with this request's id, or None.

    Raises:
        TenSafeFault: REQUEST_ID_CONFLICT if that call asked for something else.
    """
    request_id: str = request.request_id  # type: ignore[attr-defined]
    row = await store.request(scope, request_id)
    if row is not None and row.request_hash != request_hash(request):
        raise TenSafeFault(
            "REQUEST_ID_CONFLICT",
            f"request id {request_id!r} was used for another request; draw a new one",
            field="request_id",
        )
    return row


def new_request(scope: str, request: Message, subject: str) -> RequestRow:
    """The record of a first call that makes `subject`."""
    request_id: str = request.request_id  # type: ignore[attr-defined]
    return RequestRow(scope, request_id, request_hash(request), subject)


def request_hash(request: Message) -> bytes:
    data = type(request).__name__.encode() + request.SerializeToString(deterministic=True)
    return hashlib.blake2b(data, digest_size=16).digest()
