"""What an operation costs on its whole way, as ratios to a bare echo in the same run.

Every operation is a forward_backward of one 64-token datum on the mock backend: sent, validated,
committed to SQLite (synchronous=FULL), executed by a worker process, its result committed, pushed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import grpc
from local_service import LocalService, local_service

from benchmarks.echo import METHOD, echo_server, latencies_s, rate
from tensafe.v1 import operations_pb2, operations_pb2_grpc, training_pb2, training_pb2_grpc
from tensafe_client import Datum, ServiceClient
from tensafe_client.data.batches import encode_batch
from tensafe_client.io_loop import io_loop

IN_FLIGHT = 128
ECHO_BYTES = 1024
BATCH = [Datum(tokens=range(64), target_tokens=range(64), weights=[1.0] * 64)]


def measure(rounds: int, operations: int) -> dict[str, list[float]]:
    """Interleaved rounds of all cells; seconds for `*_p50_s`, per second for `*_rate`."""
    cells: dict[str, list[float]] = {}
    with echo_server() as echo, local_service(backend="mock") as service:
        client = ServiceClient(service.target, api_key=service.api_key)
        echo_channel = _on_loop(lambda: grpc.aio.insecure_channel(echo))
        call = echo_channel.unary_unary(METHOD)
        payload = b"x" * ECHO_BYTES
        run = io_loop().run
        for number in range(rounds + 1):
            found = {
                "echo_p50_s": median(run(latencies_s(call, payload, 300))),
                "operation_p50_s": median(_operation_latencies_s(client, 300)),
                "echo_rate": run(rate(call, payload, 2 * operations, IN_FLIGHT)),
                "futures_rate": _futures_rate(client, 2 * operations),
                "one_rpc_each_rate": run(_one_rpc_each(service, client, operations)),
            }
            if number:  # the first round warms everything up
                for name, value in found.items():
                    cells.setdefault(name, []).append(value)
        run(echo_channel.close())
        client.close()
    return cells


def ratios(cells: dict[str, list[float]]) -> dict[str, float]:
    """Ratios of the best rounds: the least disturbed ones, on a machine that others use too."""
    return {
        "operation_p50/echo_p50": min(cells["operation_p50_s"]) / min(cells["echo_p50_s"]),
        "one_rpc_each/echo_rate": max(cells["one_rpc_each_rate"]) / max(cells["echo_rate"]),
        "futures/echo_rate": max(cells["futures_rate"]) / max(cells["echo_rate"]),
    }


def _operation_latencies_s(client: ServiceClient, count: int) -> list[float]:
    tc = client.create_training_client({"model_ref": "mock", "batch_size": 1})
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        tc.forward_backward(BATCH).result()
        times.append(time.perf_counter() - begin)
    return times


def _futures_rate(client: ServiceClient, count: int) -> float:
    tc = client.create_training_client({"model_ref": "mock", "batch_size": 1})
    begin = time.perf_counter()
    for future in [tc.forward_backward(BATCH) for _ in range(count)]:
        future.result()
    return count / (time.perf_counter() - begin)


async def _one_rpc_each(service: LocalService, client: ServiceClient, count: int) -> float:
    """Submit, a unary call for each operation, and one shared Watch for their results."""
    channel = grpc.aio.insecure_channel(service.target.removeprefix("grpc://"))
    training = training_pb2_grpc.TrainingServiceStub(channel)
    metadata = (("authorization", f"Bearer {service.api_key}"),)
    created = await training.CreateRun(
        training_pb2.CreateRunRequest(
            request_id=f"bench-{time.time_ns()}",
            config=training_pb2.RunConfig(model_ref="mock"),
        ),
        metadata=metadata,
    )
    run_id = created.run.id
    watch = operations_pb2_grpc.OperationsServiceStub(channel).Watch(
        operations_pb2.WatchRequest(run_id=run_id), metadata=metadata
    )
    await watch.read()
    slots = asyncio.Semaphore(IN_FLIGHT)
    payload = training_pb2.Payload(inline=encode_batch(BATCH).message)
    work = training_pb2.ForwardBackward(batch=payload)

    async def submit(seq: int) -> None:
        operation = training_pb2.OperationSpec(run_id=run_id, seq=seq, forward_backward=work)
        request = training_pb2.SubmitRequest(operation=operation)
        await training.Submit(request, metadata=metadata)

    async def collect() -> None:
        finished = 0
        while finished < count:
            response = await watch.read()
            finished += len(response.events)
            for _ in response.events:
                slots.release()

    begin = time.perf_counter()
    collecting = asyncio.create_task(collect())
    tasks = []
    for seq in range(1, count + 1):
        await slots.acquire()
        tasks.append(asyncio.create_task(submit(seq)))
    await asyncio.gather(*tasks, collecting)
    elapsed = time.perf_counter() - begin
    watch.cancel()
    await channel.close()
    return count / elapsed


def _on_loop(make: Callable[[], Any]) -> Any:
    async def call() -> Any:
        return make()

    return io_loop().run(call())
