"""Plans as a coordinator would send them."""

from __future__ import annotations

import numpy as np

from tensafe.v1 import training_pb2, types_pb2, worker_pb2
from tensafe.wire.tensors import encode


def batch(lengths: tuple[int, ...] = (3, 2), **changes) -> training_pb2.Payload:
    """Token ids 3, 4, …; every target scored."""
    count = sum(lengths)
    arrays = {
        "target_tokens": np.arange(count, dtype=np.int32) + 4,
        "weights": np.ones(count, np.float32),
    } | changes
    message = training_pb2.Batch(
        offsets=encode(np.cumsum([0, *lengths], dtype=np.int64)),
        input_tokens=encode(np.arange(count, dtype=np.int32) + 3),
        loss_inputs=[
            types_pb2.NamedTensor(name=name, tensor=encode(array)) for name, array in arrays.items()
        ],
    )
    return training_pb2.Payload(inline=message)


def forward_backward(**options) -> dict:
    return {"forward_backward": training_pb2.ForwardBackward(batch=batch(), **options)}


def operation(seq: int | None, run: str | None = "run-1", *, epoch: int = 1, **kind):
    """A planned operation; `kind` is one field of OperationSpec, others of PlannedOperation."""
    own = {name: kind.pop(name) for name in list(kind) if name in _PLANNED}
    spec = training_pb2.OperationSpec(run_id=run, seq=seq, **kind)
    return worker_pb2.PlannedOperation(
        operation_id=own.pop("operation_id", f"op-{run}-{seq}"),
        epoch=epoch,
        spec=spec.SerializeToString(),
        **own,
    )


_PLANNED = {
    *("group", "replay", "failed", "void", "artifact_id", "model_ref", "operation_id"),
    *("charge", "units"),
}


def assignment(run: str = "run-1", *, epoch: int = 1, artifact_id: str = "", **config):
    fields = {"model_ref": "any", "seed": 3} | config
    return worker_pb2.RunAssignment(
        run_id=run,
        epoch=epoch,
        config=training_pb2.RunConfig(**fields),
        artifact_id=artifact_id,
    )


def plan(*operations, runs=()):
    return worker_pb2.Plan(runs=runs, operations=operations)
