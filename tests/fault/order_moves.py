"""Moves of which single courses of events are made, and what they are held to."""

from __future__ import annotations

from typing import Any

from fault.order_world import World, forward_backward
from google.rpc.status_pb2 import Status

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.wire.status import from_status

GRADIENT: dict[str, Any] = {"forward_backward": forward_backward()}
UPDATE: dict[str, Any] = {"optim_step": training.OptimStep()}


def submit(world: World, run: str, *operations: dict[str, Any]) -> list[str]:
    return [world.do(world.submit(run, **operation)) for operation in operations]


def flow(world: World, times: int = 8) -> None:
    """Everything goes on but the drawing of tokens."""
    for _ in range(times):
        world.do(world.deliver())
        world.worker.execute()
        world.do(world.report())


def outcomes(world: World, run: str) -> list[str]:
    """SUCCEEDED, or the reason, of each of a run's operations."""
    return [
        from_status(Status.FromString(row.error)).reason
        if row.error
        else ops.OperationState.Name(row.state).removeprefix("OPERATION_STATE_")
        for row in world.rows(run)
    ]
