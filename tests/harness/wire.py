"""Speaks the protos directly, for what the SDK would refuse to send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np
from grpc_status import rpc_status

from tensafe.v1 import training_pb2 as pb
from tensafe.v1 import training_pb2_grpc, types_pb2
from tensafe.wire.channel import client_options
from tensafe.wire.status import ErrorDetail, from_status
from tensafe.wire.tensors import encode


@dataclass(frozen=True)
class RawClient:
    """A channel with a key."""

    stub: training_pb2_grpc.TrainingServiceStub
    metadata: Sequence[tuple[str, str]]

    def submit(self, operation: pb.OperationSpec) -> ErrorDetail | None:
        """Submits one operation; returns its error, None if it was accepted."""
        try:
            self.stub.Submit(
                pb.SubmitRequest(operation=operation), metadata=self.metadata, timeout=30
            )
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            if status is None:
                raise  # an error without google.rpc.Status is a defect
            return from_status(status)
        return None

    def next_seq(self, run_id: str) -> int:
        """The seq that the run's next operation must have."""
        answer = self.stub.AttachRun(
            pb.AttachRunRequest(run_id=run_id), metadata=self.metadata, timeout=30
        )
        return int(answer.run.next_seq)


@contextmanager
def raw_client(target: str, api_key: str) -> Iterator[RawClient]:
    """Opens a channel to `grpc://HOST:PORT`."""
    with grpc.insecure_channel(target.removeprefix("grpc://"), options=client_options()) as channel:
        yield RawClient(
            training_pb2_grpc.TrainingServiceStub(channel),
            [("authorization", f"Bearer {api_key}")],
        )


def int32(values: Sequence[int]) -> types_pb2.Tensor:
    """An int32 tensor."""
    return encode(np.asarray(values, np.int32))


def int64(values: Sequence[int]) -> types_pb2.Tensor:
    """An int64 tensor."""
    return encode(np.asarray(values, np.int64))


def float32(values: Sequence[float]) -> types_pb2.Tensor:
    """A float32 tensor."""
    return encode(np.asarray(values, np.float32))


def batch(
    offsets: types_pb2.Tensor,
    tokens: types_pb2.Tensor,
    **loss_inputs: types_pb2.Tensor,
) -> pb.Batch:
    """A batch of whatever tensors."""
    return pb.Batch(
        offsets=offsets,
        input_tokens=tokens,
        loss_inputs=[
            types_pb2.NamedTensor(name=name, tensor=tensor) for name, tensor in loss_inputs.items()
        ],
    )


def forward_backward(run_id: str, seq: int, content: pb.Batch) -> pb.OperationSpec:
    """A forward_backward of whatever batch."""
    return pb.OperationSpec(
        run_id=run_id,
        seq=seq,
        forward_backward=pb.ForwardBackward(batch=pb.Payload(inline=content)),
    )
