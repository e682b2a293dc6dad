"""The executor between a coordinator's plans and a backend."""

from __future__ import annotations

import hashlib
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from unit.workers.planned import assignment, batch, forward_backward, operation, plan

from tensafe.v1 import artifacts_pb2, training_pb2
from tensafe.wire.status import TenSafeFault, from_status
from workers.executor import Executor
from workers.mock import MockBackend
from workers.snapshots import SnapshotPolicy

OPTIM = {"optim_step": training_pb2.OptimStep()}
SAVE = {"save_state": training_pb2.SaveState()}


class FolderTransfers:
    """Artifacts in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.snapshots: list[tuple[str, int, int, int]] = []
        self.refusal: str | None = None

    def upload(
        self, artifact_id: str, epoch: int, directory: Path
    ) -> list[artifacts_pb2.ArtifactFile]:
        shutil.copytree(directory, self.root / artifact_id)
        return [
            artifacts_pb2.ArtifactFile(
                name=path.name,
                size_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in sorted(directory.iterdir())
        ]

    def fetch(self, artifact_id: str, directory: Path) -> None:
        self.fetched.append(artifact_id)
        shutil.copytree(self.root / artifact_id, directory, dirs_exist_ok=True)

    def upload_snapshot(self, run_id, epoch, seq, step, directory: Path) -> str | None:
        self.snapshots.append((run_id, epoch, seq, step))
        name = f"snap-{run_id}-{seq}"
        shutil.copytree(directory, self.root / name)
        return self.refusal

    def fetch_snapshot(self, snapshot_id: str, directory: Path) -> None:
        self.fetch(snapshot_id, directory)


class GatedBackend(MockBackend):
    """Stops in forward_backward until it is let go."""

    instant = False

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def forward_backward(self, run_id, seq, request):
        self.entered.release()
        assert self.gate.acquire(timeout=10)
        return super().forward_backward(run_id, seq, request)


class Driver:
    """The link's part: submits, and waits for news."""

    def __init__(self, backend, transfers) -> None:
        self.news = threading.Condition()
        self.executor = Executor(backend, transfers, self._notify)
        self.executor.start()
        self.started, self.done = [], {}

    def _notify(self) -> None:
        with self.news:
            self.news.notify_all()

    def collect(self) -> None:
        started, done = self.executor.collect()
        self.started += [item.operation_id for item in started]
        for item in done:
            self.done[item.operation_id] = item

    def until(self, condition) -> None:
        def arrived() -> bool:
            self.collect()
            return condition()

        with self.news:
            assert self.news.wait_for(arrived, timeout=10)

    def run(self, *operations, runs=()) -> list:
        """The outcomes of a plan's operations, None where nothing was reported."""
        for item in operations:
            self.done.pop(item.operation_id, None)
        self.executor.submit(plan(*operations, runs=runs))
        self.until(lambda: self.executor.idle)
        return [self.done.get(item.operation_id) for item in operations]


@pytest.fixture
def transfers(tmp_path):
    return FolderTransfers(tmp_path)


@pytest.fixture
def driver(transfers):
    driver = Driver(MockBackend(), transfers)
    yield driver
    driver.executor.close()


@pytest.fixture
def gated(transfers):
    driver = Driver(backend := GatedBackend(), transfers)
    driver.backend = backend
    yield driver
    backend.gate.release(100)
    driver.executor.close()


def reason(done) -> str:
    return from_status(done.error).reason


def test_a_step_and_its_metrics(driver):
    first, second = driver.run(
        operation(1, **forward_backward()), operation(2, **OPTIM), runs=[assignment()]
    )
    metrics = {m.name: m.value for m in first.result.forward_backward.metrics}
    assert (metrics["loss"], metrics["tokens"]) == (2.49, 5)
    (output,) = first.result.forward_backward.outputs
    assert (output.name, list(output.tensor.shape)) == ("logprobs", [5])
    assert (second.result.optim_step.step, second.result.optim_step.applied) == (1, True)
    names = [metric.name for metric in second.step_metrics]
    assert names == [
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "compute_ms",
    ]
    assert second.epoch == 1
    (held,) = driver.executor.held_runs()
    assert (held.run_id, held.epoch, held.last_seq) == ("run-1", 1, 2)


def test_a_bad_batch_poisons_its_window_and_the_next_is_clean(driver):
    bad = training_pb2.ForwardBackward(batch=batch(weights=np.ones((5, 1), np.float32)))
    outcomes = driver.run(
        operation(1, **forward_backward()),
        operation(2, forward_backward=bad),
        operation(3, **OPTIM),
        operation(4, **forward_backward()),
        operation(5, **OPTIM),
        runs=[assignment()],
    )
    assert reason(outcomes[1]) == "INVALID_BATCH"
    assert reason(outcomes[2]) == "WINDOW_POISONED"
    assert outcomes[4].result.optim_step.step == 1


def test_void_poisons_or_closes_and_says_nothing(driver):
    outcomes = driver.run(
        operation(1, **forward_backward(), void=True),
        operation(2, **OPTIM),
        operation(3, **forward_backward()),
        operation(4, **OPTIM, void=True),
        operation(5, **OPTIM),
        runs=[assignment()],
    )
    assert outcomes[0] is outcomes[3] is None
    assert reason(outcomes[1]) == "WINDOW_POISONED"
    assert reason(outcomes[4]) == "EMPTY_WINDOW"


def test_replay_rebuilds_the_state_and_reports_what_it_gave(driver, transfers):
    outcomes = driver.run(
        operation(1, **forward_backward(), replay=True),
        operation(2, **OPTIM, replay=True),
        operation(3, **SAVE, artifact_id="art-9", replay=True),
        operation(4, **forward_backward()),
        runs=[assignment(epoch=1)],
    )
    assert [outcome and outcome.replay for outcome in outcomes] == [True, True, None, False]
    assert {outcome.run_id for outcome in outcomes[:2]} == {"run-1"}
    assert outcomes[1].result.optim_step.step == 1
    assert not (transfers.root / "art-9").exists()
    losses = {m.name: m.value for m in outcomes[3].result.forward_backward.metrics}
    assert losses["loss"] == 2.48


def test_a_replay_that_fails_as_it_did_is_reported(driver):
    replayed = operation(1, **OPTIM, replay=True, failed=True)
    (outcome,) = driver.run(replayed, runs=[assignment()])
    assert reason(outcome) == "EMPTY_WINDOW"
    assert outcome.replay


def test_a_run_whose_replay_fails_is_given_up(driver):
    outcomes = driver.run(
        operation(1, **OPTIM, replay=True),
        operation(2, **forward_backward(), replay=True),
        operation(3, **forward_backward()),
        runs=[assignment()],
    )
    assert outcomes == [None] * 3, "what comes after it is left to the next assignment"
    (refused,) = driver.executor.collect_refused()
    assert (refused.run_id, refused.epoch, refused.snapshot_id) == ("run-1", 1, "")
    assert from_status(refused.error).reason == "EMPTY_WINDOW"
    assert driver.executor.held_runs() == []


def test_a_check_of_a_log_goes_on_past_a_replay_that_fails(driver):
    check = assignment()
    check.check = True
    outcomes = driver.run(
        operation(1, **OPTIM, replay=True),
        operation(2, **forward_backward(), replay=True),
        runs=[check],
    )
    assert reason(outcomes[0]) == "EMPTY_WINDOW"
    assert outcomes[1].HasField("result")


def test_save_and_load_and_open_from_an_artifact(driver, transfers):
    saved, loaded = driver.run(
        operation(1, **forward_backward()),
        operation(2, **OPTIM),
        operation(3, **SAVE, artifact_id="art-1"),
        operation(4, load_state=training_pb2.LoadState(artifact_id="art-1")),
        runs=[assignment()],
    )[2:]
    artifact = saved.result.save_state.artifact
    assert (artifact.id, artifact.run_id, artifact.step) == ("art-1", "run-1", 1)
    assert artifact.has_optimizer
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in artifact.files)
    assert artifact.sha256 == hashlib.sha256(listing.encode()).hexdigest()
    assert artifact.size_bytes == sum(file.size_bytes for file in artifact.files) > 0
    assert loaded.result.load_state.step == 1
    assert loaded.result.load_state.optimizer_restored
    (outcome,) = driver.run(
        operation(1, "run-2", **forward_backward()),
        runs=[assignment("run-2", artifact_id="art-1")],
    )
    assert outcome.result.forward_backward.metrics[0].value == 2.48
    assert transfers.fetched == ["art-1"]


def test_samples_of_every_kind_of_weights(driver):
    def sample(**weights):
        source = training_pb2.SampleWeights(**weights)
        return {
            "sample": training_pb2.Sample(prompts=[training_pb2.Prompt(text="hi")], weights=source)
        }

    outcomes = driver.run(
        operation(1, **forward_backward()),
        operation(2, **OPTIM),
        operation(3, **SAVE, artifact_id="art-1"),
        operation(4, **sample(current=training_pb2.CurrentWeights())),
        operation(
            None, None, epoch=0, **sample(base_model="any"), operation_id="op-b", model_ref="any"
        ),
        operation(
            None,
            None,
            epoch=0,
            **sample(artifact_id="art-1"),
            operation_id="op-a",
            artifact_id="art-1",
        ),
        operation(
            None, "run-1", **sample(version={"step": 1}), operation_id="op-v", artifact_id="art-1"
        ),
        runs=[assignment()],
    )
    steps = [outcome.result.sample.model_step for outcome in outcomes[3:]]
    assert steps == [1, 0, 1, 1]


def test_a_run_that_cannot_be_opened_fails_its_own_operations_only(driver):
    lora = training_pb2.LoraConfig(bias="all")
    sgd = training_pb2.OptimizerConfig(name="sgd", eps=1e-8)
    outcomes = driver.run(
        operation(1, "run-bias", **forward_backward()),
        operation(1, "run-sgd", **forward_backward()),
        operation(1, "run-lost", **forward_backward()),
        operation(1, **forward_backward()),
        runs=[
            assignment("run-bias", lora=lora),
            assignment("run-sgd", optimizer=sgd),
            assignment("run-lost", artifact_id="art-none"),
            assignment(),
        ],
    )
    reasons = [reason(outcome) for outcome in outcomes[:2]]
    assert reasons == ["UNSUPPORTED_OPTION", "UNSUPPORTED_OPTION"]
    # What may pass is no fault of the run: another worker may have more luck.
    assert outcomes[2] is None
    (refused,) = driver.executor.collect_refused()
    assert (refused.run_id, refused.snapshot_id) == ("run-lost", "")
    assert outcomes[3].HasField("result")
    assert [held.run_id for held in driver.executor.held_runs()] == ["run-1"]


@pytest.mark.parametrize("reason", ["CHECKSUM_MISMATCH", "STORAGE_UNAVAILABLE"])
def test_a_run_whose_saved_state_did_not_arrive_is_given_up(driver, transfers, monkeypatch, reason):
    def fetch(artifact_id, directory):
        raise TenSafeFault(reason, "it arrived with other bytes; try again", retry_delay_s=1.0)

    monkeypatch.setattr(transfers, "fetch", fetch)
    lost = assignment(artifact_id="art-1")
    assert driver.run(operation(1, **forward_backward()), runs=[lost]) == [None]
    (refused,) = driver.executor.collect_refused()
    assert from_status(refused.error).reason == reason


def test_unknown_runs_and_stale_epochs_fail_without_harm(driver, caplog):
    unknown, stale, repeated = driver.run(
        operation(1, "run-x", **forward_backward()),
        operation(1, epoch=7, **forward_backward()),
        operation(1, **forward_backward()),
        runs=[assignment()],
    )
    assert reason(unknown) == "INTERNAL"
    # The driver keeps one outcome for each operation, and the last one is the right one.
    assert stale is repeated
    assert repeated.epoch == 1
    assert repeated.HasField("result")
    assert caplog.text.count("is not held under epoch") >= 2


def test_an_unexpected_exception_keeps_its_text_to_itself(driver, caplog, monkeypatch):
    def explode(run_id, seq, request):
        raise ValueError("secret path /data/tenants")

    monkeypatch.setattr(driver.executor._backend, "forward_backward", explode)
    (outcome,) = driver.run(operation(1, **forward_backward()), runs=[assignment()])
    assert reason(outcome) == "INTERNAL"
    assert "secret" not in outcome.error.message
    error_id = from_status(outcome.error).metadata["error_id"]
    assert error_id in outcome.error.message
    assert error_id in caplog.text
    assert "secret path" in caplog.text


def test_an_operation_that_is_sent_again_gets_its_first_answer(driver):
    (first,) = driver.run(operation(1, **forward_backward()), runs=[assignment()])
    (again,) = driver.run(operation(1, **forward_backward()), runs=[assignment()])
    assert again == first
    (step,) = driver.run(operation(2, **OPTIM))
    assert step.result.optim_step.step == 1
    # Under a new epoch the run starts anew, and the same operation runs anew.
    (anew,) = driver.run(operation(1, epoch=2, **forward_backward()), runs=[assignment(epoch=2)])
    assert anew.epoch == 2
    assert anew.HasField("result")


def test_release_forgets_a_run_after_what_was_planned(driver):
    driver.executor.submit(plan(operation(1, **forward_backward()), runs=[assignment()]))
    driver.executor.release("run-1")
    driver.until(lambda: driver.executor.idle)
    assert driver.done["op-run-1-1"].HasField("result")
    assert driver.executor.held_runs() == []


def test_the_runs_held_are_told_with_what_was_sent_of_them(gated):
    gated.executor.submit(
        plan(
            *(operation(seq, **forward_backward()) for seq in (1, 2, 3)),
            runs=[assignment(), assignment("run-2")],
        )
    )
    assert gated.backend.entered.acquire(timeout=10)
    told = {held.run_id: (held.last_seq, held.planned_seq) for held in gated.executor.held_runs()}
    assert told == {"run-1": (0, 3), "run-2": (0, 0)}
    gated.backend.gate.release(2)
    assert [gated.backend.entered.acquire(timeout=10) for _ in "23"] == [True, True]
    (held,) = [held for held in gated.executor.held_runs() if held.run_id == "run-1"]
    assert (held.last_seq, held.planned_seq) == (2, 3), "what runs was sent too"
    assert held.operation_ids == ["op-run-1-1", "op-run-1-2", "op-run-1-3"]
    gated.backend.gate.release(1)
    gated.until(lambda: gated.executor.idle)
    assert [held.planned_seq for held in gated.executor.held_runs()] == [3, 0]


def test_a_run_that_is_still_to_be_taken_on_is_told_as_it_will_be(gated):
    """Whoever hears of a new stream would else not know that it has to be taken back."""
    gated.executor.submit(plan(operation(1, **forward_backward()), runs=[assignment()]))
    assert gated.backend.entered.acquire(timeout=10)
    check = assignment("run-3")
    check.check = True
    anew = operation(1, epoch=2, **forward_backward())
    gated.executor.submit(plan(anew, runs=[assignment(epoch=2), assignment("run-2"), check]))
    told = {held.run_id: held for held in gated.executor.held_runs()}
    assert told.keys() == {"run-1", "run-2"}
    assert (told["run-1"].epoch, told["run-1"].last_seq, told["run-1"].planned_seq) == (2, 0, 1)
    assert list(told["run-1"].operation_ids) == ["op-run-1-1"]
    gated.executor.release("run-2")
    gated.backend.gate.release(2)
    gated.until(lambda: gated.executor.idle)
    assert [held.run_id for held in gated.executor.held_runs()] == ["run-1"]


def test_only_what_still_runs_is_reported_started(gated):
    gated.executor.submit(
        plan(
            operation(1, **forward_backward()),
            operation(2, **forward_backward()),
            runs=[assignment()],
        )
    )
    gated.until(lambda: gated.started == ["op-run-1-1"])
    gated.backend.gate.release()
    gated.until(lambda: gated.started == ["op-run-1-1", "op-run-1-2"])
    assert list(gated.done) == ["op-run-1-1"]
    gated.backend.gate.release()
    gated.until(lambda: len(gated.done) == 2)
    assert not gated.executor.collect()[0]


def test_cancel_before_and_after_the_start(gated):
    gated.executor.submit(
        plan(
            operation(1, **forward_backward()),
            operation(2, **forward_backward()),
            operation(3, **OPTIM),
            operation(4, **OPTIM),
            runs=[assignment()],
        )
    )
    assert gated.backend.entered.acquire(timeout=10)
    gated.executor.cancel("op-run-1-1")
    gated.executor.cancel("op-run-1-2")
    gated.executor.cancel("op-run-1-4")
    gated.executor.cancel("op-nobody")
    gated.until(lambda: len(gated.done) == 2)
    assert gated.done["op-run-1-2"].cancelled
    assert gated.done["op-run-1-2"].WhichOneof("outcome") is None
    gated.backend.gate.release()
    gated.until(lambda: gated.executor.idle)
    assert gated.done["op-run-1-1"].HasField("result")
    assert not gated.done["op-run-1-1"].cancelled
    # The cancelled forward_backward poisoned the window; the cancelled optim_step did nothing.
    assert reason(gated.done["op-run-1-3"]) == "WINDOW_POISONED"
    assert gated.done["op-run-1-4"].cancelled
    (held,) = gated.executor.held_runs()
    assert held.last_seq == 4


def test_what_runs_already_is_not_cancelled_by_being_sent_again(gated):
    """A broken stream: the coordinator sends again what runs, and a cancel comes for it."""
    executor, backend = gated.executor, gated.executor._backend
    first = operation(1, **forward_backward())
    executor.submit(plan(first, runs=[assignment()]))
    assert backend.entered.acquire(timeout=10)
    gated.until(lambda: gated.started == [first.operation_id])
    executor.submit(plan(first))
    gated.until(lambda: gated.started == [first.operation_id] * 2)  # the new stream is told, too
    executor.cancel(first.operation_id)
    gated.collect()
    assert not gated.done
    backend.gate.release()
    gated.until(lambda: executor.idle)
    assert gated.done[first.operation_id].HasField("result")


def test_leaving_finishes_what_runs_then_flushes_and_begins_nothing_more(gated, transfers):
    executor, backend = gated.executor, gated.executor._backend
    executor.snapshots.policy = SnapshotPolicy(steps=99)
    operations = [operation(seq, **forward_backward()) for seq in (1, 2, 3)]
    executor.submit(plan(*operations, runs=[assignment()]))
    assert backend.entered.acquire(timeout=10)
    executor.leave()
    assert not executor.idle
    backend.gate.release()
    gated.until(lambda: executor.idle)
    assert [run.last_seq for run in executor.held_runs()] == [1]
    assert transfers.snapshots == [("run-1", 1, 1, 0)]
    assert list(gated.done) == [operations[0].operation_id]


def test_a_thread_that_has_lacked_memory_hands_over_to_another(transfers):
    threads: list[threading.Thread] = []

    class SpoilingBackend(MockBackend):
        @property
        def thread_is_spoiled(self) -> bool:
            return threads.count(threading.current_thread()) == 2

        def forward_backward(self, run_id, seq, request):
            threads.append(threading.current_thread())
            return super().forward_backward(run_id, seq, request)

    driver = Driver(SpoilingBackend(), transfers)
    for seq in range(1, 6):
        (done,) = driver.run(operation(seq, **forward_backward()), runs=[assignment()])
        assert not done.HasField("error")
    first, second, third = threads[0], threads[2], threads[4]
    assert threads == [first, first, second, second, third]
    assert len({first, second, third}) == 3
    driver.executor.close()
    assert not any(thread.is_alive() for thread in threads)
