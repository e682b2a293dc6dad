"""Rows of the operation log as messages."""

from __future__ import annotations

import logging

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from tensafe.v1 import operations_pb2 as pb
from tensafe_server.blobs.base import BlobNotFoundError
from tensafe_server.blobs.payloads import DamagedPayloadError, Payloads
from tensafe_server.store.base import OperationRow

log = logging.getLogger(__name__)


async def operation_message(
    row: OperationRow, payloads: Payloads, *, with_result: bool = True
) -> pb.Operation:
    """An operation as callers see it."""
    message = bare_operation(row)
    if with_result and (row.result is not None or row.result_ref is not None):
        try:
            data = await payloads.load(row.result, row.result_ref)
        except BlobNotFoundError:  # pruned between the reading of the row and of the blob
            message.result_pruned = True
        except DamagedPayloadError:  # whoever watches hears of all others
            log.error("the result of %s is damaged in the blob store", row.id)
            message.result_pruned = True
        else:
            message.result.ParseFromString(data)
    return message


def bare_operation(row: OperationRow) -> pb.Operation:
    """An operation without its result."""
    message = pb.Operation()
    describe(row, message)
    return message


def describe(row: OperationRow, message: pb.Operation) -> None:
    """Fills in all of an operation but its result. In place: what is built apart is copied when it
    is put into another message."""
    message.id = row.id
    message.run_id = row.run_id or ""
    message.seq = row.seq or 0
    message.kind = row.kind  # type: ignore[assignment]
    message.state = row.state  # type: ignore[assignment]
    message.queue_ms = row.queue_ms or 0.0
    message.compute_ms = row.compute_ms or 0.0
    if row.kind not in (pb.OPERATION_KIND_PRIVATE_STEP, pb.OPERATION_KIND_SAMPLE):
        message.fingerprint = row.fingerprint or ""
    message.result_pruned = bool(row.result_pruned) and row.state == pb.OPERATION_STATE_SUCCEEDED
    _set_time(message.created_at, row.created_ns)
    if row.error is not None:
        message.error.CopyFrom(Status.FromString(row.error))
    if row.finished_ns is not None:
        _set_time(message.finished_at, row.finished_ns)


_LONGEST_TTL_NS = 3_153_600_000 * 10**9


def expires_at(now_ns: int, ttl: Duration) -> Timestamp:
    """When a time to live is over; one from before it had a bound is cut to it, 100 years."""
    return timestamp(now_ns + min(ttl.ToNanoseconds(), _LONGEST_TTL_NS))


def _set_time(message: Timestamp, nanoseconds: int) -> None:
    message.seconds, message.nanos = divmod(nanoseconds, 10**9)


def timestamp(nanoseconds: int) -> Timestamp:
    """Nanoseconds since 1970 as a Timestamp."""
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)
