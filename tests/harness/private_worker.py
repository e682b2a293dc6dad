"""A worker of private runs that computes nothing, and keeps every promise of the protocol.

It runs in a thread of the test, holds runs, executes plans, stores the state after each step that
it applies under a charge, and reports. A test can stop it before any of these, make it vanish, and
look at what it was told.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.rpc.error_details_pb2 import ErrorInfo

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1 import worker_pb2 as pb
from tensafe.v1 import worker_pb2_grpc
from tensafe.v1.models_pb2 import LinearModule, Model
from tensafe.v1.privacy_pb2 import DpMetrics
from tensafe.v1.types_pb2 import (
    REDUCTION_LAST,
    REDUCTION_MEAN,
    REDUCTION_SUM,
    FileChunk,
    Metric,
    NamedTensor,
)
from tensafe.wire.status import TenSafeFault, to_status
from tensafe.wire.tensors import decode, encode

_DATA = b"adapter and optimizer"


@dataclass
class HeldRun:
    """A run, as far as this worker knows one.

    Attributes:
        window: (operation id, units) of what the accumulation window holds.
        calls: optim_steps since the last applied one.
        applied: (charge id, window) of each update that was made here.
        operation_ids: what it was sent, replays aside.
    """

    epoch: int
    accumulation_steps: int
    last_seq: int
    step: int = 0
    calls: int = 0
    window: list[tuple[str, list[int]]] = field(default_factory=list)
    poisoned: bool = False
    applied: list[tuple[str, list[tuple[str, list[int]]]]] = field(default_factory=list)
    operation_ids: list[str] = field(default_factory=list)


class PrivateWorker:
    """A private worker.

    Attributes:
        before: called with "begin", "snapshot" or "report" and the operation before that is done;
            it may block, or raise `Vanished`.
        refuses: why private steps fail when their batch is there; empty: they do not.
        runs: what it holds, by run.
        planned: every operation that it was sent.
        assignments: every run that it was to take on.
        drawn: of each private step, the datums that it fetched.
        releases: charges under which it has made an update, by run, in all of its lives.
        windows: the operations that each of these summed.

    Args:
        comes_back: it connects anew, with all that it holds, when its stream breaks.
    """

    def __init__(self, target: str, key: str, *, comes_back: bool = False) -> None:
        self._comes_back = comes_back
        self._instance = secrets.token_hex(8)
        self._metadata = [("authorization", f"Bearer {key}")]
        self._channel = grpc.insecure_channel(target)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self.before: Callable[[str, pb.PlannedOperation], None] = lambda stage, planned: None
        self.refuses = ""
        self.runs: dict[str, HeldRun] = {}
        self.planned: list[pb.PlannedOperation] = []
        self.assignments: list[pb.RunAssignment] = []
        self.drawn: dict[str, list[list[int]]] = defaultdict(list)
        self.releases: dict[str, list[str]] = defaultdict(list)
        self.windows: dict[str, list[list[str]]] = defaultdict(list)
        self.news = threading.Condition()
        self._answers: dict[tuple[str, int], pb.OperationDone] = {}
        self._unstored: set[tuple[str, int]] = set()
        self._worker_id = ""
        self._threads: list[threading.Thread] = []
        model = Model(
            name="private",
            references=["m"],
            vocabulary_size=1000,
            context_length=64,
            linear_modules=[LinearModule(name=n, count=1) for n in "qkvo"],
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            model.linear_modules.add(name=name, count=1)
        self._stub.PublishModel(
            pb.PublishModelRequest(model=model), metadata=self._metadata, wait_for_ready=True
        )
        self.connect()

    def connect(self) -> None:
        """Opens a stream, naming the runs that it holds."""
        outgoing: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        held = [
            pb.HeldRun(
                run_id=run_id,
                epoch=run.epoch,
                last_seq=run.last_seq,
                operation_ids=run.operation_ids,
            )
            for run_id, run in self.runs.items()
        ]
        register = pb.Register(
            name="private",
            backend="mock",
            models=["private"],
            credits=8,
            held_runs=held,
            instance=self._instance,
        )
        outgoing.put(pb.ConnectRequest(register=register))
        stream = self._stub.Connect(
            iter(outgoing.get, None), metadata=self._metadata, wait_for_ready=True
        )
        self._outgoing = outgoing
        self._stream = stream
        thread = threading.Thread(target=self._work, args=(stream, outgoing), daemon=True)
        thread.start()
        threading.Thread(target=self._beat, args=(thread, outgoing), daemon=True).start()
        self._threads.append(thread)

    def vanish(self) -> None:
        """The process is gone, and all that it held."""
        self._comes_back = False
        self.runs.clear()
        self._answers.clear()
        self._unstored.clear()
        self._stream.cancel()
        self._outgoing.put(None)

    def give_up(self, run_id: str, reason: str) -> None:
        """It cannot keep the run."""
        run = self.runs.pop(run_id)
        error = to_status(TenSafeFault(reason, "why").detail)
        refused = pb.RefusedSnapshot(run_id=run_id, epoch=run.epoch, error=error)
        self._outgoing.put(pb.ConnectRequest(report=pb.Report(refused=[refused])))

    def cut(self) -> None:
        """The stream is gone; what it holds stays."""
        self._stream.cancel()
        self._outgoing.put(None)

    def join(self) -> None:
        """Waits until what it was at has ended."""
        for thread in self._threads:
            thread.join(30)

    def close(self) -> None:
        self.vanish()
        self._channel.close()

    def wait_planned(self, count: int, timeout_s: float = 30.0) -> list[pb.PlannedOperation]:
        """Waits until it was sent so many operations."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.planned) >= count, timeout_s), self.planned
            return self.planned[:count]

    def _beat(self, work, outgoing) -> None:
        while work.is_alive():
            outgoing.put(pb.ConnectRequest(heartbeat=pb.WorkerHeartbeat()))
            work.join(1.0)

    def _work(self, stream, outgoing) -> None:
        try:
            for message in stream:
                if message.HasField("welcome"):
                    self._worker_id = message.welcome.worker_id
                elif message.HasField("release"):
                    self.runs.pop(message.release.run_id, None)
                for assignment in message.plan.runs:
                    self._take_on(assignment)
                for planned in message.plan.operations:
                    with self.news:
                        self.planned.append(planned)
                        self.news.notify_all()
                    done = self._execute(planned)
                    if done is not None:
                        self.before("report", planned)
                        outgoing.put(pb.ConnectRequest(report=pb.Report(done=[done])))
        except (grpc.RpcError, VanishedError):
            outgoing.put(None)
        if self._comes_back:
            self.connect()

    def _take_on(self, assignment: pb.RunAssignment) -> None:
        with self.news:
            self.assignments.append(assignment)
            self.news.notify_all()
        run = HeldRun(
            assignment.epoch,
            max(1, assignment.config.gradient_accumulation_steps),
            assignment.seq,
        )
        if assignment.snapshot_id:
            chunks = self._stub.FetchSnapshot(
                pb.FetchSnapshotRequest(snapshot_id=assignment.snapshot_id),
                metadata=self._metadata,
            )
            data = b"".join(one.chunk.data for one in chunks)
            assert data.startswith(_DATA)
            run.step = int(data[len(_DATA) :])
        self.runs[assignment.run_id] = run

    def _execute(self, planned: pb.PlannedOperation) -> pb.OperationDone | None:
        spec = training.OperationSpec.FromString(planned.spec)
        run = self.runs.get(spec.run_id)
        key = planned.operation_id, planned.epoch
        if key in self._answers:
            return self._answers[key]
        assert run is not None
        assert run.epoch == planned.epoch
        if planned.void:
            if spec.HasField("optim_step"):
                run.window, run.calls, run.poisoned = [], 0, False
            else:
                run.poisoned = True
            run.last_seq = max(run.last_seq, spec.seq)
            return None
        assert spec.seq > run.last_seq or key in self._unstored
        if not planned.replay:
            run.operation_ids.append(planned.operation_id)
        self.before("begin", planned)
        done = pb.OperationDone(
            operation_id=planned.operation_id, epoch=planned.epoch, replay=planned.replay
        )
        if planned.replay:
            done.run_id = spec.run_id
        kind = spec.WhichOneof("operation")
        if kind == "forward_backward":
            self._gradient(run, planned, spec, done)
        elif kind in ("optim_step", "private_step"):
            self._step(run, planned, spec, done)
        elif kind == "load_state":
            run.window = []
            done.result.load_state.artifact_id = spec.load_state.artifact_id
            done.result.load_state.step = run.step
        else:
            raise AssertionError(kind)
        run.last_seq = spec.seq
        if not planned.replay:
            self._answers[key] = done
        return done

    def _gradient(self, run, planned, spec, done) -> None:
        units = decode(planned.units).tolist()
        offsets = decode(spec.forward_backward.batch.inline.offsets)
        assert len(units) == len(offsets) - 1
        run.window.append((planned.operation_id, units))
        result = done.result.forward_backward
        tokens = int(offsets[-1])
        # More than a private run's owner may see.
        result.metrics.extend(
            [
                Metric(name="loss", value=1.5, reduction=REDUCTION_MEAN, weight=tokens),
                Metric(name="tokens", value=tokens, reduction=REDUCTION_SUM),
                Metric(name="grad_norm", value=7.0, reduction=REDUCTION_LAST),
            ]
        )
        logprobs = encode(np.zeros(tokens, np.float32))
        result.outputs.append(NamedTensor(name="logprobs", tensor=logprobs))

    def _step(self, run, planned, spec, done) -> None:
        key = planned.operation_id, planned.epoch
        if key not in self._unstored and not self._apply(run, planned, spec, done):
            return
        # From here on the update is made: whatever breaks, it is stored and told, not made again.
        self._unstored.add(key)
        run.last_seq = spec.seq
        self.before("snapshot", planned)
        done.snapshot_id = self._store(run, planned, spec)
        result = done.result.optim_step
        result.step, result.applied, result.learning_rate, result.grad_norm = run.step, True, 0.1, 2
        result.dp.CopyFrom(DpMetrics(noise_applied=True, num_clipped=3))
        done.compute_ms = 12.0
        for name in ("loss", "grad_norm", "tokens", "compute_ms"):
            done.step_metrics.add(name=name, value=1.0, reduction=REDUCTION_LAST)

    def _apply(self, run, planned, spec, done) -> bool:
        """Whether an update was made; else `done` says why not."""
        if spec.HasField("private_step"):
            self._fetch(run, planned)
            if self.refuses:
                run.window = []
                _refuse(planned, done, self.refuses)
                return False
        elif run.calls + 1 < run.accumulation_steps:
            run.calls += 1
            done.charge_unused = planned.HasField("charge")
            done.result.optim_step.step = run.step
            return False
        elif run.poisoned or not run.window:
            reason = "WINDOW_POISONED" if run.poisoned else "EMPTY_WINDOW"
            run.window, run.calls, run.poisoned = [], 0, False
            _refuse(planned, done, reason)
            return False
        assert planned.HasField("charge")
        run.applied.append((planned.charge.id, run.window))
        self.releases[spec.run_id].append(planned.charge.id)
        self.windows[spec.run_id].append([operation for operation, _ in run.window])
        run.window, run.calls = [], 0
        run.step += 1
        return True

    def _fetch(self, run, planned) -> None:
        answers = self._stub.FetchPrivateBatch(
            pb.FetchPrivateBatchRequest(
                worker_id=self._worker_id,
                operation_id=planned.operation_id,
                charge_id=planned.charge.id,
            ),
            metadata=self._metadata,
        )
        rows: list[list[int]] = []
        for answer in answers:
            offsets = decode(answer.batch.offsets).tolist()
            tokens = decode(answer.batch.input_tokens).tolist()
            rows += [tokens[a:b] for a, b in itertools.pairwise(offsets)]
            run.window.append((planned.operation_id, decode(answer.units).tolist()))
        self.drawn[planned.operation_id] = rows

    def _store(self, run, planned, spec) -> str:
        data = _DATA + str(run.step).encode()
        header = pb.SnapshotHeader(
            worker_id=self._worker_id,
            run_id=spec.run_id,
            epoch=planned.epoch,
            seq=spec.seq,
            step=run.step,
            charge_id=planned.charge.id,
        )
        chunk = FileChunk(
            name="state.bin",
            data=data,
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        answer = self._stub.UploadSnapshot(
            iter([pb.UploadSnapshotRequest(header=header), pb.UploadSnapshotRequest(chunk=chunk)]),
            metadata=self._metadata,
            wait_for_ready=True,
        )
        assert answer.snapshot_id, answer.refusal
        return answer.snapshot_id


class VanishedError(Exception):
    """The worker's process ends here."""


def _refuse(planned: pb.PlannedOperation, done: pb.OperationDone, reason: str) -> None:
    """Nothing was noised, says the worker."""
    done.charge_unused = planned.HasField("charge")
    done.error.code = 9
    done.error.message = "no update"
    done.error.details.add().Pack(ErrorInfo(reason=reason, domain="tensafe"))


def is_kind(planned: pb.PlannedOperation, kind: str) -> bool:
    """Whether a planned operation is of that kind."""
    return training.OperationSpec.FromString(planned.spec).WhichOneof("operation") == kind


__all__ = ["PrivateWorker", "VanishedError", "is_kind", "ops"]
