"""SAMPLEs that run beside what follows them, between a coordinator's plans and a sampler."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from unit.workers.planned import assignment, forward_backward, operation, plan
from unit.workers.test_executor import OPTIM, Driver, FolderTransfers, reason

from tensafe.v1 import training_pb2
from workers.execution import Execution
from workers.mock import MockBackend
from workers.mock_sampler import MockSampler

SAMPLE = {"sample": training_pb2.Sample(prompts=[training_pb2.Prompt(text="hi")])}


class SteppedSampler(MockSampler):
    """Waits before each step until it may take it; an operation ends after `most` steps, or in the
    way that `fault` says."""

    def __init__(self, sample) -> None:
        super().__init__(sample)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.most = 3
        self.fault: Exception | None = None
        self._steps: dict[str, int] = {}

    def submit(self, operation_id, key, request, on_chunk=None) -> None:
        super().submit(operation_id, key, request, on_chunk)
        self._steps[operation_id] = 0

    def step(self) -> None:
        self.entered.release()
        assert self.gate.acquire(timeout=10)
        if self.fault is not None:
            raise self.fault
        super().step()
        for operation_id in self._jobs:
            self._steps[operation_id] += 1

    def collect(self):
        held = {name: job for name, job in self._jobs.items() if self._steps[name] < self.most}
        for name in held:
            del self._jobs[name]
        ended = super().collect()
        self._jobs |= held
        return ended


class SteppedBackend(MockBackend):
    instant = False

    def __init__(self) -> None:
        super().__init__()
        self._sampler = SteppedSampler(self._sample)


@pytest.fixture
def driver(tmp_path):
    driver = Driver(backend := SteppedBackend(), FolderTransfers(tmp_path))
    driver.sampler = backend.sampler
    yield driver
    driver.sampler.gate.release(1000)
    driver.executor.close()


def ids(*seqs: int) -> list[str]:
    return [f"op-run-1-{seq}" for seq in seqs]


def sampled_step(driver, operation_id: str) -> int:
    return driver.done[operation_id].result.sample.model_step


def begin_sample(driver, *more) -> None:
    """A step, then a sample, which waits in its first step."""
    driver.executor.submit(
        plan(
            operation(1, **forward_backward()),
            operation(2, **OPTIM),
            operation(3, **SAMPLE),
            *more,
            runs=[assignment()],
        )
    )
    driver.until(lambda: ids(3)[0] in driver.started)
    assert driver.sampler.entered.acquire(timeout=10)


def test_what_follows_goes_on_and_the_sample_keeps_the_weights_of_its_place(driver):
    begin_sample(driver, operation(4, **forward_backward()), operation(5, **OPTIM))
    driver.sampler.gate.release()
    # The two are done while the sample still has steps to go.
    driver.until(lambda: set(driver.done) >= set(ids(4, 5)))
    assert ids(3)[0] not in driver.done
    assert not driver.executor.idle
    (held,) = driver.executor.held_runs()
    assert held.last_seq == 5
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert sampled_step(driver, ids(3)[0]) == 1
    assert driver.done[ids(5)[0]].result.optim_step.step == 2


def test_a_sample_joins_those_that_run(driver):
    begin_sample(driver)
    driver.executor.submit(plan(operation(1, "run-2", **SAMPLE), runs=[assignment("run-2")]))
    driver.sampler.gate.release()
    driver.until(lambda: "op-run-2-1" in driver.started)
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert sampled_step(driver, ids(3)[0]) == 1
    assert sampled_step(driver, "op-run-2-1") == 0


def test_a_running_sample_is_stopped_before_its_next_step_and_alone(driver):
    begin_sample(driver)
    driver.executor.submit(plan(operation(1, "run-2", **SAMPLE), runs=[assignment("run-2")]))
    driver.sampler.gate.release()
    driver.until(lambda: "op-run-2-1" in driver.started)
    assert driver.sampler.entered.acquire(timeout=10)
    for _ in range(2):  # twice is the same as once
        driver.executor.cancel(ids(3)[0])
    driver.sampler.gate.release()
    driver.until(lambda: ids(3)[0] in driver.done)
    stopped = driver.done[ids(3)[0]]
    assert stopped.cancelled
    assert stopped.WhichOneof("outcome") is None
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert driver.done["op-run-2-1"].HasField("result")
    (again,) = driver.run(operation(4, **SAMPLE))
    assert again.HasField("result")


def test_a_waiting_sample_is_cancelled_as_anything_else(driver):
    begin_sample(driver)
    driver.executor.submit(plan(operation(4, **SAMPLE)))
    driver.executor.cancel(ids(4)[0])
    driver.until(lambda: ids(4)[0] in driver.done)
    assert driver.done[ids(4)[0]].cancelled
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert ids(4)[0] not in driver.started


def test_sent_again_while_it_runs_it_is_told_of_and_not_begun_again(driver):
    begin_sample(driver)
    driver.executor.new_stream()
    driver.executor.submit(plan(operation(3, **SAMPLE)))
    driver.until(lambda: driver.started.count(ids(3)[0]) == 2)
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert sampled_step(driver, ids(3)[0]) == 1
    # And once more: its answer is remembered.
    driver.done.clear()
    (answer,) = driver.run(operation(3, **SAMPLE))
    assert answer.result.sample.model_step == 1
    assert driver.started.count(ids(3)[0]) == 2


def test_a_new_stream_gets_all_pieces_again(driver, monkeypatch):
    plain = Execution.sample_request

    def streaming(self, spec, planned):
        request, key = plain(self, spec, planned)
        return replace(request, stream=True), key

    monkeypatch.setattr(Execution, "sample_request", streaming)
    driver.sampler.most = 4
    begin_sample(driver)
    driver.sampler.gate.release(2)
    for _ in range(2):
        assert driver.sampler.entered.acquire(timeout=10)
    first = driver.executor.collect_chunks()
    assert [(epoch, chunk.position, chunk.text) for epoch, chunk in first] == [
        (1, 0, " "),
        (1, 1, "["),
    ]
    assert driver.executor.collect_chunks() == []
    driver.executor.new_stream()
    assert driver.executor.collect_chunks() == first
    driver.sampler.gate.release(1000)
    driver.until(lambda: driver.executor.idle)
    rest = driver.executor.collect_chunks()
    result = driver.done[ids(3)[0]].result.sample.completions[0]
    assert "".join(chunk.text for _, chunk in first + rest) == result.completion
    driver.executor.new_stream()
    assert driver.executor.collect_chunks() == []  # it has ended: the result says all


@pytest.mark.parametrize("leaves", ["released", "assigned anew", "given up"])
def test_a_run_that_leaves_takes_its_samples_along_without_a_word(driver, leaves):
    begin_sample(driver)
    driver.executor.submit(
        plan(
            operation(None, "run-1", epoch=0, operation_id="op-lane", **SAMPLE),
            operation(1, "run-2", **SAMPLE),
            runs=[assignment("run-2")],
        )
    )
    driver.sampler.gate.release()
    driver.until(lambda: "op-run-2-1" in driver.started)
    if leaves == "released":
        driver.executor.release("run-1")
    elif leaves == "assigned anew":
        driver.executor.submit(plan(runs=[assignment(epoch=2)]))
    else:  # what succeeded in the log fails in a replay
        driver.executor.submit(plan(operation(4, **OPTIM, replay=True)))
    driver.sampler.gate.release(1000)
    driver.until(lambda: driver.executor.idle)
    # Others go on, and so does what belongs to no assignment.
    assert set(driver.done) == {*ids(1, 2), "op-run-2-1", "op-lane"}


def test_what_the_sampler_does_not_take_fails_alone(driver):
    begin_sample(driver)
    lost = training_pb2.SampleWeights(artifact_id="art-none")
    sample = training_pb2.Sample(prompts=SAMPLE["sample"].prompts, weights=lost)
    driver.executor.submit(plan(operation(None, None, epoch=0, operation_id="op-x", sample=sample)))
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert reason(driver.done["op-x"]) == "INTERNAL"
    assert driver.done[ids(3)[0]].HasField("result")


def test_a_step_that_breaks_fails_what_runs_and_nothing_else(driver):
    begin_sample(driver)
    driver.sampler.fault = RuntimeError("a kernel fell over")
    driver.sampler.gate.release()
    driver.until(lambda: driver.executor.idle)
    assert reason(driver.done[ids(3)[0]]) == "INTERNAL"
    driver.sampler.fault = None
    driver.sampler.gate.release(10)
    trained, sampled = driver.run(operation(4, **forward_backward()), operation(5, **SAMPLE))
    assert trained.HasField("result")
    assert sampled.HasField("result")


def test_leaving_finishes_what_is_sampled(driver, tmp_path):
    begin_sample(driver)
    driver.executor.submit(plan(operation(4, **SAMPLE)))
    driver.executor.leave()
    assert not driver.executor.idle
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert set(driver.done) == set(ids(1, 2, 3))


def test_a_sample_in_a_replay_is_passed_over(driver):
    outcomes = driver.run(
        operation(1, **SAMPLE, replay=True),
        operation(2, **OPTIM, replay=True, failed=True),
        runs=[assignment()],
    )
    assert outcomes[0] is None
    assert outcomes[1].replay


def test_the_watchdog_is_told_of_the_sample_that_may_take_longest(driver):
    longer = training_pb2.Sample(
        prompts=SAMPLE["sample"].prompts, params=training_pb2.SamplingParams(max_tokens=1000)
    )
    begin_sample(driver)
    driver.executor.submit(plan(operation(4, sample=longer)))
    driver.sampler.gate.release()
    driver.until(lambda: ids(4)[0] in driver.started)
    assert driver.sampler.entered.acquire(timeout=10)
    step = driver.executor.activity.step
    assert (step.operation_id, step.run_id) == (ids(4)[0], "run-1")
    assert step.limit_s > 600 + 50
    driver.sampler.gate.release(10)
    driver.until(lambda: driver.executor.idle)
    assert driver.executor.activity.step is None
