"""How large an outcome may be: what is larger could be told to nobody, however often it is sent."""

from __future__ import annotations

from tensafe.v1 import worker_pb2
from tensafe.wire.channel import TRANSPORT_LIMIT_BYTES
from tensafe.wire.status import TenSafeFault

# Room for what goes with it in one message, to the coordinator and from there to a watcher.
MOST_BYTES = TRANSPORT_LIMIT_BYTES - 4 * 2**20


def check_size(done: worker_pb2.OperationDone) -> None:
    """Raises TenSafeFault MESSAGE_TOO_LARGE for an outcome that does not fit into a message."""
    size = done.ByteSize()
    if size > MOST_BYTES:
        raise TenSafeFault(
            "MESSAGE_TOO_LARGE",
            f"the result of operation {done.operation_id} has {size:,} bytes, and at most "
            f"{MOST_BYTES:,} can be told; send a smaller batch, or ask for less of each token",
            operation_id=done.operation_id,
            size_bytes=size,
            limit_bytes=MOST_BYTES,
        )
