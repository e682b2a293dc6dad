"""The baseline of the latency benchmark: a bare grpc.aio unary echo, in a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

METHOD = "/echo.Echo/Call"


async def _serve() -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("echo.Echo", {"Call": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def echo_server() -> Iterator[str]:
    """Runs the echo server; yields its HOST:PORT."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


async def latencies_s(call: Any, payload: bytes, count: int) -> list[float]:
    """Seconds of each of `count` calls, one after another."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        await call(payload)
        times.append(time.perf_counter() - begin)
    return times


async def rate(call: Any, payload: bytes, count: int, in_flight: int) -> float:
    """Calls per second with `in_flight` at a time."""
    remaining = iter(range(count))

    async def lane() -> None:
        for _ in remaining:
            await call(payload)

    begin = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(in_flight)))
    return count / (time.perf_counter() - begin)


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
