"""An in-memory coordinator on loopback: real gRPC, no model, and faults on demand."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count as counting
from typing import Any

import grpc
import numpy as np
from grpc_status import rpc_status

from tensafe.v1 import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    metrics_pb2,
    metrics_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    operations_pb2_grpc,
    training_pb2_grpc,
    types_pb2,
)
from tensafe.v1 import (
    operations_pb2 as ops,
)
from tensafe.v1 import (
    training_pb2 as pb,
)
from tensafe.wire.channel import server_options
from tensafe.wire.status import TenSafeFault, to_status
from tensafe.wire.tensors import decode, encode

API_KEY = "ts_test"
FILES = {
    "adapter_config.json": b'{"r": 16}',
    "adapter_model.safetensors": bytes(range(256)) * 9000,  # three chunks
}

_KINDS = {
    "forward": ops.OPERATION_KIND_FORWARD,
    "forward_backward": ops.OPERATION_KIND_FORWARD_BACKWARD,
    "optim_step": ops.OPERATION_KIND_OPTIM_STEP,
    "sample": ops.OPERATION_KIND_SAMPLE,
    "save_state": ops.OPERATION_KIND_SAVE_STATE,
    "load_state": ops.OPERATION_KIND_LOAD_STATE,
}
_FINISHED = (
    ops.OPERATION_STATE_SUCCEEDED,
    ops.OPERATION_STATE_FAILED,
    ops.OPERATION_STATE_CANCELLED,
)


@dataclass
class Stored:
    """An operation with what was sent."""

    operation: ops.Operation
    spec: pb.OperationSpec
    session_id: str


class FakeCoordinator(
    training_pb2_grpc.TrainingServiceServicer,
    operations_pb2_grpc.OperationsServiceServicer,
    metrics_pb2_grpc.MetricsServiceServicer,
    artifacts_pb2_grpc.ArtifactsServiceServicer,
    models_pb2_grpc.ModelsServiceServicer,
):
    """Keeps its state over `stop` and `start`, as a coordinator with a store does.

    Attributes:
        hold: operations are accepted and do not run until `release`.
        gate: a batch waits for it before it does anything.
        lose_replies: so many batches are taken and then answered UNAVAILABLE.
        internal_errors: so many batches fail INTERNAL before anything is recorded.
        queue_full: so many operations are refused with QUEUE_FULL first.
        fail: seqs that end FAILED, with the fault.
        refuse: seqs that are refused at submission, with the fault.
        batches: the seqs of each batch as it came.
        submit_streams: how many streams of batches were opened.
        watches: the cursor of each Watch call as it came; None if it was unset.
        starts: how often it was started.
        unanswered: so many GetRun calls fail INTERNAL.
        broken_runs: and so do those for these runs.
        reads: the ids of the runs and operations of each GetRun and GetOperation call.
        scripts: what each StreamSample call sends first, in turn; None cuts the stream, a fault
            ends it.
        streams: how many of those calls came.
        drawn: the completions of samples; unset, a short one for each prompt.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.hold = False
        self.gate = threading.Event()
        self.gate.set()
        self.lose_replies = 0
        self.internal_errors = 0
        self.queue_full = 0
        self.cut_download_after: int | None = None
        self.fail: dict[int, TenSafeFault] = {}
        self.refuse: dict[int, TenSafeFault] = {}
        self.batches: list[list[int]] = []
        self.submit_streams = 0
        self.requests: list[bytes] = []
        self.watches: list[int | None] = []
        self.starts = 0
        self.unanswered = 0
        self.broken_runs: set[str] = set()
        self.reads: list[str] = []
        self.downloads: list[tuple[str, int]] = []
        self.runs: dict[str, pb.Run] = {}
        self.by_place: dict[tuple[str, int], str] = {}
        self.by_request: dict[str, str] = {}
        self.stored: dict[str, Stored] = {}
        self.events: list[tuple[str, Any]] = []
        self.metrics: dict[str, list[metrics_pb2.StepMetrics]] = {}
        self.scripts: list[list[ops.TokenChunk | None]] = []
        self.drawn: list[ops.Completion] = []
        self.streams = 0
        self._cut = 0
        self._numbers = counting(1)
        self._server: grpc.Server | None = None
        self.port = 0

    # -- life

    def start(self) -> str:
        self.starts += 1
        self._server = grpc.server(ThreadPoolExecutor(32), options=server_options())
        training_pb2_grpc.add_TrainingServiceServicer_to_server(self, self._server)
        operations_pb2_grpc.add_OperationsServiceServicer_to_server(self, self._server)
        metrics_pb2_grpc.add_MetricsServiceServicer_to_server(self, self._server)
        artifacts_pb2_grpc.add_ArtifactsServiceServicer_to_server(self, self._server)
        models_pb2_grpc.add_ModelsServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        assert self._server is not None
        self.cut_watches()
        self.gate.set()
        self._server.stop(0).wait()

    def cut_watches(self) -> None:
        """Ends every stream that is open now."""
        with self.lock:
            self._cut += 1
            self.lock.notify_all()

    def forget(self, count: int) -> None:
        """Loses the operations that it has accepted last."""
        with self.lock:
            for operation_id in list(self.stored)[-count:]:
                operation = self.stored.pop(operation_id).operation
                if operation.seq:
                    del self.by_place[operation.run_id, operation.seq]
                    run = self.runs[operation.run_id]
                    run.next_seq = min(run.next_seq, operation.seq)

    def release(self, count: int | None = None) -> None:
        """Runs the first `count` waiting operations; None: all, and those to come."""
        with self.lock:
            self.hold = count is not None
            waiting = [s for s in self.stored.values() if s.operation.state not in _FINISHED]
            for stored in waiting[:count]:
                self._execute(stored)

    # -- training

    def CreateRun(self, request: pb.CreateRunRequest, context: grpc.ServicerContext) -> Any:
        self._authenticate(context)
        with self.lock:
            run = pb.Run(
                id=f"run-{len(self.runs) + 1}",
                config=request.config,
                next_seq=1,
                status=pb.RUN_STATUS_ACTIVE,
            )
            self.runs[run.id] = run
            return pb.CreateRunResponse(run=run)

    def GetRun(self, request: pb.GetRunRequest, context: grpc.ServicerContext) -> Any:
        self.reads.append(request.run_id)
        if self.unanswered or request.run_id in self.broken_runs:
            self.unanswered = max(0, self.unanswered - 1)
            self._abort(context, TenSafeFault("INTERNAL", "the server failed, error id 1"))
        return pb.GetRunResponse(run=self._run(request.run_id, context))

    def AttachRun(self, request: pb.AttachRunRequest, context: grpc.ServicerContext) -> Any:
        return pb.AttachRunResponse(run=self._run(request.run_id, context))

    def ListRuns(self, request: pb.ListRunsRequest, context: grpc.ServicerContext) -> Any:
        runs = list(reversed(self.runs.values()))
        begin = int(request.page_token or 0)
        page = runs[begin : begin + 2]
        token = str(begin + 2) if begin + 2 < len(runs) else ""
        return pb.ListRunsResponse(runs=page, next_page_token=token)

    def DeleteRun(self, request: pb.DeleteRunRequest, context: grpc.ServicerContext) -> Any:
        run = self._run(request.run_id, context)
        run.status = pb.RUN_STATUS_DELETED
        return pb.DeleteRunResponse(run=run)

    def SubmitBatch(self, request: pb.SubmitBatchRequest, context: grpc.ServicerContext) -> Any:
        self._authenticate(context)
        self.gate.wait(timeout=30)
        with self.lock:
            if self.internal_errors:
                self.internal_errors -= 1
                self._abort(context, TenSafeFault("INTERNAL", "the server failed, error id 1"))
            self.batches.append([spec.seq for spec in request.operations])
            self.requests.append(request.SerializeToString(deterministic=True))
            outcomes = [self._submit(spec, request.session_id) for spec in request.operations]
            if self.lose_replies:
                self.lose_replies -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "the reply is lost")
        return pb.SubmitBatchResponse(outcomes=outcomes)

    def SubmitStream(
        self, requests: Iterator[pb.SubmitStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.SubmitStreamResponse]:
        with self.lock:
            self.submit_streams += 1
            self.lock.notify_all()
        for request in requests:
            yield pb.SubmitStreamResponse(batch=self.SubmitBatch(request.batch, context))

    # -- operations

    def GetOperation(self, request: ops.GetOperationRequest, context: grpc.ServicerContext) -> Any:
        self.reads.append(request.operation_id)
        return ops.GetOperationResponse(operation=self._stored(request, context).operation)

    def WaitOperation(
        self, request: ops.WaitOperationRequest, context: grpc.ServicerContext
    ) -> Any:
        stored = self._stored(request, context)
        with self.lock:
            cut = self._cut
            self.lock.wait_for(
                lambda: stored.operation.state in _FINISHED or self._cut != cut, timeout=30
            )
            return ops.WaitOperationResponse(operation=stored.operation)

    def CancelOperation(
        self, request: ops.CancelOperationRequest, context: grpc.ServicerContext
    ) -> Any:
        stored = self._stored(request, context)
        with self.lock:
            sampling = stored.operation.kind == ops.OPERATION_KIND_SAMPLE
            if stored.operation.state == ops.OPERATION_STATE_QUEUED or (
                sampling and stored.operation.state == ops.OPERATION_STATE_RUNNING
            ):
                stored.operation.state = ops.OPERATION_STATE_CANCELLED
                fault = TenSafeFault("OPERATION_CANCELLED", "cancelled by the caller")
                stored.operation.error.CopyFrom(to_status(fault.detail))
                self._publish(stored)
            return ops.CancelOperationResponse(operation=stored.operation)

    def Watch(self, request: ops.WatchRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        self._authenticate(context)
        cursor = request.cursor if request.HasField("cursor") else None
        with self.lock:
            self.watches.append(cursor)
            self.lock.notify_all()
            cut = self._cut
            if cursor is not None and cursor > len(self.events):
                self._abort(
                    context, TenSafeFault("CURSOR_OUT_OF_RANGE", "the cursor is from the future")
                )
            seen = len(self.events) if cursor is None else cursor
        yield ops.WatchResponse(cursor=seen, first_cursor=self.starts)
        while context.is_active():
            with self.lock:
                while len(self.events) <= seen and self._cut == cut and context.is_active():
                    self.lock.wait(timeout=1)
                if self._cut != cut:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the stream is cut")
                new, seen = self.events[seen:], len(self.events)
            mine = [
                ops.WatchEvent(operation=operation)
                for session_id, operation in new
                if session_id == request.session_id
            ]
            yield ops.WatchResponse(events=mine, cursor=seen, first_cursor=self.starts)

    def StreamSample(
        self, request: ops.StreamSampleRequest, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        stored = self._stored(request, context)
        self.streams += 1
        script = self.scripts.pop(0) if self.scripts else []
        for step in script:
            if isinstance(step, ops.TokenChunk):
                yield ops.StreamSampleResponse(chunks=[step])
            elif isinstance(step, TenSafeFault):
                self._abort(context, step)
            else:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the stream is cut")
        while context.is_active():
            with self.lock:
                cut = self._cut
                if stored.operation.state not in _FINISHED:
                    self.lock.wait(timeout=1)
                if self._cut != cut:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the stream is cut")
                if stored.operation.state in _FINISHED:
                    yield ops.StreamSampleResponse(operation=stored.operation)
                    return

    def StreamMetrics(
        self, request: metrics_pb2.StreamMetricsRequest, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        self._run(request.run_id, context)
        since = request.since
        while context.is_active():
            with self.lock:
                cut = self._cut
                steps = self.metrics.setdefault(request.run_id, [])
                new = [step for step in steps if step.cursor > since]
            if new:
                since = new[-1].cursor
                yield metrics_pb2.StreamMetricsResponse(metrics=new, cursor=since)
            if not request.follow:
                return
            with self.lock:
                while not (steps and steps[-1].cursor > since) and self._cut == cut:
                    self.lock.wait(timeout=30)
                if self._cut != cut:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the stream is cut")

    # -- artifacts and models

    def GetArtifact(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.artifact_id != "art-1":
            self._abort(
                context,
                TenSafeFault(
                    "ARTIFACT_NOT_FOUND",
                    f"there is no artifact {request.artifact_id}",
                    artifact_id=request.artifact_id,
                ),
            )
        return artifacts_pb2.GetArtifactResponse(artifact=_artifact())

    def DownloadArtifact(
        self, request: artifacts_pb2.DownloadArtifactRequest, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        self.downloads.append((request.file, request.offset))
        data = FILES[request.file]
        for offset in range(request.offset, len(data), 2**20):
            if self.cut_download_after is not None and offset >= self.cut_download_after:
                self.cut_download_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "the download is cut")
            chunk = types_pb2.FileChunk(
                name=request.file,
                offset=offset,
                data=data[offset : offset + 2**20],
                size_bytes=len(data),
            )
            yield artifacts_pb2.DownloadArtifactResponse(chunk=chunk)

    def GetTokenizer(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        data = b'{"a tokenizer": true}'
        for offset in (0, 5):
            last = offset == 5
            yield models_pb2.GetTokenizerResponse(
                chunk=types_pb2.FileChunk(
                    name="tokenizer.json",
                    offset=offset,
                    data=data[offset:] if last else data[:5],
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest() if last else "",
                )
            )

    # -- inside

    def _submit(self, spec: pb.OperationSpec, session_id: str) -> pb.SubmitOutcome:
        if self.queue_full:
            self.queue_full -= 1
            fault = TenSafeFault("QUEUE_FULL", "the queue is full", retry_delay_s=0.01)
            return pb.SubmitOutcome(error=to_status(fault.detail))
        numbered = spec.HasField("seq")
        known = (
            self.by_place.get((spec.run_id, spec.seq))
            if numbered
            else self.by_request.get(spec.request_id)
        )
        if known is not None:
            return pb.SubmitOutcome(operation_id=known)
        operation = ops.Operation(
            id=f"op-{next(self._numbers)}",
            run_id=spec.run_id,
            seq=spec.seq,
            kind=_KINDS[spec.WhichOneof("operation")],
            state=ops.OPERATION_STATE_QUEUED,
        )
        stored = Stored(
            operation, pb.OperationSpec.FromString(spec.SerializeToString()), session_id
        )
        self.stored[operation.id] = stored
        if numbered:
            self.by_place[spec.run_id, spec.seq] = operation.id
            run = self.runs[spec.run_id]
            run.next_seq = max(run.next_seq, spec.seq + 1)
        else:
            self.by_request[spec.request_id] = operation.id
        fault = self.refuse.get(spec.seq)
        if spec.HasField("forward_backward") and not spec.forward_backward.HasField("batch"):
            fault = TenSafeFault("INVALID_ARGUMENT", "forward_backward.batch: value is required")
        if fault is not None:
            status = to_status(fault.detail)
            operation.state = ops.OPERATION_STATE_FAILED
            operation.error.CopyFrom(status)
            return pb.SubmitOutcome(operation_id=operation.id, error=status)
        if not self.hold:
            self._execute(stored)
        return pb.SubmitOutcome(operation_id=operation.id)

    def _execute(self, stored: Stored) -> None:
        operation, spec = stored.operation, stored.spec
        if operation.seq in self.fail:
            operation.state = ops.OPERATION_STATE_FAILED
            operation.error.CopyFrom(to_status(self.fail[operation.seq].detail))
        else:
            operation.state = ops.OPERATION_STATE_SUCCEEDED
            getattr(self, f"_{spec.WhichOneof('operation')}")(stored)
        self._publish(stored)

    def _forward_backward(self, stored: Stored) -> None:
        result = stored.operation.result.forward_backward
        batch = stored.spec.forward_backward.batch.inline
        values = {"loss": 2.49, "grad_norm": 1.5, "tokens": decode(batch.input_tokens).size}
        result.metrics.extend(types_pb2.Metric(name=n, value=v) for n, v in values.items())
        result.outputs.append(_logprobs(batch))

    def _forward(self, stored: Stored) -> None:
        result = stored.operation.result.forward
        result.metrics.append(types_pb2.Metric(name="loss", value=2.0))
        result.outputs.append(_logprobs(stored.spec.forward.batch.inline))

    def _optim_step(self, stored: Stored) -> None:
        run = self.runs[stored.spec.run_id]
        run.step += 1
        result = stored.operation.result.optim_step
        result.step, result.applied = run.step, True
        result.learning_rate = stored.spec.optim_step.learning_rate or 1e-4
        result.grad_norm = 1.5
        steps = self.metrics.setdefault(run.id, [])
        values = {"loss": 2.5 - 0.01 * run.step, "tokens": 9, "learning_rate": 1e-4}
        steps.append(
            metrics_pb2.StepMetrics(
                cursor=len(self.events) + 1,
                run_id=run.id,
                step=run.step,
                values=[types_pb2.Metric(name=n, value=v) for n, v in values.items()],
            )
        )

    def _sample(self, stored: Stored) -> None:
        result = stored.operation.result.sample
        if self.drawn:
            result.completions.extend(self.drawn)
            return
        for index, prompt in enumerate(stored.spec.sample.prompts):
            result.completions.add(
                prompt_index=index,
                prompt=prompt.text,
                completion=" and so on",
                tokens=encode(np.array([1, 2], np.int32)),
                logprobs=encode(np.array([-1, -2], np.float32)),
                finish_reason=ops.FINISH_REASON_LENGTH,
            )

    def _save_state(self, stored: Stored) -> None:
        artifact = _artifact()
        artifact.metadata.CopyFrom(stored.spec.save_state.metadata)
        stored.operation.result.save_state.artifact.CopyFrom(artifact)

    def _load_state(self, stored: Stored) -> None:
        result = stored.operation.result.load_state
        result.artifact_id, result.step = stored.spec.load_state.artifact_id, 7

    def _publish(self, stored: Stored) -> None:
        stored.operation.finished_at.GetCurrentTime()
        copy = ops.Operation.FromString(stored.operation.SerializeToString())
        self.events.append((stored.session_id, copy))
        self.lock.notify_all()

    def _authenticate(self, context: grpc.ServicerContext) -> None:
        sent = dict(context.invocation_metadata()).get("authorization")
        if sent != f"Bearer {API_KEY}":
            self._abort(context, TenSafeFault("UNAUTHENTICATED", "the key is unknown"))

    def _run(self, run_id: str, context: grpc.ServicerContext) -> pb.Run:
        self._authenticate(context)
        if run_id not in self.runs:
            fault = TenSafeFault("RUN_NOT_FOUND", f"there is no run {run_id}", run_id=run_id)
            self._abort(context, fault)
        return self.runs[run_id]

    def _stored(self, request: Any, context: grpc.ServicerContext) -> Stored:
        self._authenticate(context)
        if request.operation_id not in self.stored:
            text = f"there is no operation {request.operation_id}"
            fault = TenSafeFault("OPERATION_NOT_FOUND", text, operation_id=request.operation_id)
            self._abort(context, fault)
        return self.stored[request.operation_id]

    @staticmethod
    def _abort(context: grpc.ServicerContext, fault: TenSafeFault) -> None:
        context.abort_with_status(rpc_status.to_status(to_status(fault.detail)))


def _logprobs(batch: pb.Batch) -> types_pb2.NamedTensor:
    """The tokens, negated."""
    logprobs = -decode(batch.input_tokens).astype(np.float32)
    return types_pb2.NamedTensor(name="logprobs", tensor=encode(logprobs))


def _artifact() -> artifacts_pb2.Artifact:
    files = [
        artifacts_pb2.ArtifactFile(
            name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
        for name, data in FILES.items()
    ]
    size = sum(file.size_bytes for file in files)
    return artifacts_pb2.Artifact(id="art-1", run_id="run-1", size_bytes=size, files=files, step=3)
