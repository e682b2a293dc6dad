"""After an operation that failed, a run is as a replay of its log will have it, or is given up."""

from __future__ import annotations

import threading

import pytest
from unit.workers.planned import assignment, forward_backward, operation, plan
from unit.workers.test_executor import OPTIM, Driver, FolderTransfers, reason

from tensafe.v1 import training_pb2
from tensafe_server.operations import voids
from workers import execution, failures, grouping
from workers.executor import Executor
from workers.mock import MockBackend


class BrittleBackend(MockBackend):
    """Fails in the calls that are named, without a known reason, before they have done anything."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()

    def _fail_in(self, call: str) -> None:
        if call in self.broken:
            raise ValueError("nobody knows why")

    def forward_backward(self, run_id, *arguments):
        self._fail_in("forward_backward")
        return super().forward_backward(run_id, *arguments)

    def optim_step(self, run_id, *arguments):
        self._fail_in("optim_step")
        return super().optim_step(run_id, *arguments)

    def load_state(self, run_id, *arguments):
        self._fail_in("load_state")
        return super().load_state(run_id, *arguments)

    def forward_backward_group(self, entries):
        self._fail_in("forward_backward")
        return super().forward_backward_group(entries)

    def optim_step_group(self, entries):
        self._fail_in("optim_step")
        return super().optim_step_group(entries)

    def poison(self, run_id):
        self._fail_in("poison")
        super().poison(run_id)


@pytest.fixture
def backend() -> BrittleBackend:
    return BrittleBackend()


@pytest.fixture
def driver(backend, tmp_path):
    driver = Driver(backend, FolderTransfers(tmp_path))
    yield driver
    driver.executor.close()


def both(seq: int, group: int, **kind):
    """An operation of two runs: one after the other, or in a group."""
    return [operation(seq, run, group=group, **kind) for run in ("run-1", "run-2")]


BOTH = [assignment("run-1"), assignment("run-2")]


def given_up(driver: Driver) -> list[str]:
    """Nothing is left of them here."""
    runs = [refused.run_id for refused in driver.executor.collect_refused()]
    assert not set(runs) & {*driver.executor._backend._runs}
    assert not driver.executor._progress._running
    return runs


@pytest.mark.parametrize("grouped", [0, 1], ids=["alone", "grouped"])
def test_a_gradient_that_failed_is_missing_from_its_window_whatever_failed(
    driver, backend, grouped
):
    driver.run(*both(1, grouped, **forward_backward()), runs=BOTH)
    backend.broken = {"forward_backward"}
    failed = driver.run(*both(2, 2 * grouped, **forward_backward()))
    backend.broken = set()
    steps = driver.run(*both(3, 3 * grouped, **OPTIM))
    assert [reason(done) for done in [*failed, *steps]] == ["INTERNAL"] * 2 + [
        "WINDOW_POISONED"
    ] * 2


@pytest.mark.parametrize("grouped", [0, 1], ids=["alone", "grouped"])
def test_a_batch_that_cannot_be_read_for_a_reason_of_the_moment_poisons(
    driver, monkeypatch, grouped
):
    with monkeypatch.context() as patch:

        def scarce(*_):
            raise MemoryError

        patch.setattr("workers.wire.gradient_request", scarce)
        driver.run(*both(1, grouped, **forward_backward()), runs=BOTH)
    driver.run(*both(2, 2 * grouped, **forward_backward()))
    steps = driver.run(*both(3, 3 * grouped, **OPTIM))
    assert [reason(done) for done in steps] == ["WINDOW_POISONED"] * 2


@pytest.mark.parametrize("grouped", [0, 1], ids=["alone", "grouped"])
def test_an_update_that_failed_for_an_unknown_reason_has_closed_its_window(
    driver, backend, grouped
):
    driver.run(*both(1, grouped, **forward_backward()), runs=BOTH)
    backend.broken = {"optim_step"}
    failed = driver.run(*both(2, 2 * grouped, **OPTIM))
    backend.broken = set()
    steps = driver.run(*both(3, 3 * grouped, **OPTIM))
    assert [reason(done) for done in [*failed, *steps]] == ["INTERNAL"] * 2 + ["EMPTY_WINDOW"] * 2


def test_both_sides_agree_on_what_closes_a_window():
    assert failures._OF_THE_MOMENT == voids._OF_THE_MOMENT


@pytest.mark.parametrize("module", [execution, grouping], ids=["alone", "grouped"])
def test_what_fails_once_the_run_has_changed_leaves_it_to_its_next_assignment(
    driver, monkeypatch, module
):
    grouped = int(module is grouping)
    driver.run(*both(1, grouped, **forward_backward()), runs=BOTH)
    with monkeypatch.context() as patch:

        def explode(*_):
            raise MemoryError

        patch.setattr(module, "write_step", explode)
        assert driver.run(*both(2, 2 * grouped, **OPTIM)) == [None, None]
    assert given_up(driver) == ["run-1", "run-2"]
    assert driver.executor.held_runs() == []
    assert driver.run(*both(3, 3 * grouped, **forward_backward())) == [None, None]
    assert not driver.executor._progress._running


@pytest.mark.parametrize("grouped", [0, 1], ids=["alone", "grouped"])
def test_a_gradient_that_cannot_be_told_fails_and_its_run_begins_anew(driver, monkeypatch, grouped):
    """It is in the window, of which the log will say that it is not."""
    driver.run(*both(1, grouped, **forward_backward()), runs=BOTH)
    with monkeypatch.context() as patch:

        def explode(*_):
            raise MemoryError

        patch.setattr("workers.wire.forward_backward_result", explode)
        failed = driver.run(*both(2, 2 * grouped, **forward_backward()))
    assert [reason(done) for done in failed] == ["INTERNAL"] * 2
    assert given_up(driver) == ["run-1", "run-2"]


def test_a_load_that_broke_off_fails_and_its_run_begins_anew(driver, backend):
    driver.run(operation(1, artifact_id="art-1", **SAVE), runs=BOTH)
    backend.broken = {"load_state"}
    load = {"load_state": training_pb2.LoadState(artifact_id="art-1")}
    (done,) = driver.run(operation(2, **load))
    assert reason(done) == "INTERNAL"
    assert given_up(driver) == ["run-1"]


SAVE = {"save_state": training_pb2.SaveState()}


@pytest.mark.parametrize("void", [False, True])
def test_a_window_that_cannot_be_marked_gives_up_its_run_alone(driver, backend, void):
    driver.run(*both(1, 0, **forward_backward()), runs=BOTH)
    backend.broken = {"forward_backward", "poison"}
    (done,) = driver.run(operation(2, void=void, **forward_backward()))
    assert (done is None) == void
    backend.broken = set()
    assert given_up(driver) == ["run-1"]
    (step,) = driver.run(operation(2, "run-2", **OPTIM))
    assert step.result.optim_step.step == 1


def test_an_executor_that_fails_says_so(backend, tmp_path, monkeypatch):
    """The link ends the process then."""
    broken = threading.Event()
    executor = Executor(backend, FolderTransfers(tmp_path), lambda: None, None, broken.set)
    executor.start()

    def explode(run_id):
        raise ValueError("nobody knows why")

    monkeypatch.setattr(backend, "close_run", explode)
    executor.submit(plan(runs=[assignment()]))
    executor.release("run-1")
    assert broken.wait(10)
    executor.close()
