"""gRPC options that all sides must agree on.

`grpc.keepalive_timeout_ms` is ignored by this generation of grpcio (grpc/grpc#39239); what closes a
dead connection is `grpc.http2.ping_timeout_ms`.
"""

from __future__ import annotations

MAX_MESSAGE_BYTES = 16 * 2**20
"""Largest request of a tenant, bytes: checked by the server, and by the SDK before it sends."""

TRANSPORT_LIMIT_BYTES = 4 * MAX_MESSAGE_BYTES
"""Where the transport itself cuts off, with a status that names no field."""

CHUNK_BYTES = 2**20
"""Size of the pieces of a chunked transfer."""

Options = list[tuple[str, int | str]]

_SHARED: Options = [
    ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]


def client_options() -> Options:
    """Options of a channel to the coordinator."""
    return [
        *_SHARED,
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]


def server_options() -> Options:
    """Options of the coordinator's server."""
    return [
        *_SHARED,
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        # A starved process reads late pings in a burst; that is no flood.
        ("grpc.http2.max_ping_strikes", 100),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.server_handshake_timeout_ms", 5_000),
        ("grpc.server.max_pending_requests", 100_000),
    ]
