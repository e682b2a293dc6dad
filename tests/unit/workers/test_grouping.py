"""Operations of several runs in one pass: each has its own outcome, whatever becomes of others."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from unit.workers.planned import assignment, batch, forward_backward, operation, plan
from unit.workers.test_executor import OPTIM, Driver, FolderTransfers, reason

from tensafe.v1 import losses_pb2, training_pb2
from workers.grouping import Member, passes
from workers.keeping import HeldRun
from workers.mock import MockBackend

RUNS = ("run-1", "run-2", "run-3")


class RecordingBackend(MockBackend):
    """Notes which runs came together."""

    group_tokens = 1024

    def __init__(self) -> None:
        super().__init__()
        self.together: list[tuple[str, list[str]]] = []

    def forward_backward_group(self, entries):
        self.together.append(("gradients", [run_id for run_id, *_ in entries]))
        return super().forward_backward_group(entries)

    def optim_step_group(self, entries):
        self.together.append(("updates", [run_id for run_id, _ in entries]))
        return super().optim_step_group(entries)


@pytest.fixture
def driver(tmp_path):
    driver = Driver(backend := RecordingBackend(), FolderTransfers(tmp_path))
    driver.backend = backend
    yield driver
    driver.executor.close()


def gradients(group: int = 1, runs=RUNS, seq: int = 1, **options):
    return [operation(seq, run, group=group, **forward_backward(), **options) for run in runs]


def updates(group: int = 2, runs=RUNS, seq: int = 2):
    return [operation(seq, run, group=group, **OPTIM) for run in runs]


def assignments(runs=RUNS, **options):
    return [assignment(run, **options) for run in runs]


def losses(outcomes) -> list[float]:
    return [outcome.result.forward_backward.metrics[0].value for outcome in outcomes]


def test_a_group_is_one_pass_with_an_outcome_for_each(driver):
    outcomes = driver.run(*gradients(), *updates(), runs=assignments())
    assert driver.backend.together == [("gradients", [*RUNS]), ("updates", [*RUNS])]
    assert losses(outcomes[:3]) == [2.49] * 3
    assert [outcome.result.optim_step.step for outcome in outcomes[3:]] == [1, 1, 1]
    assert all(outcome.step_metrics for outcome in outcomes[3:])
    assert all(outcome.compute_ms > 0 for outcome in outcomes)
    assert [outcome.company for outcome in outcomes] == [2, 2, 2, 0, 0, 0]
    assert [held.last_seq for held in driver.executor.held_runs()] == [2, 2, 2]


def test_the_time_of_a_pass_is_shared_by_tokens(driver):
    long = training_pb2.ForwardBackward(batch=batch((15, 5)))
    outcomes = driver.run(
        operation(1, "run-1", group=1, forward_backward=long),
        *gradients(runs=["run-2"]),
        runs=assignments(),
    )
    assert outcomes[0].compute_ms == pytest.approx(4 * outcomes[1].compute_ms)


def test_a_member_that_fails_leaves_the_others(driver, caplog):
    bad = training_pb2.ForwardBackward(batch=batch(weights=np.ones((5, 1), np.float32)))
    nothing = training_pb2.ForwardBackward(batch=batch(weights=np.zeros(5, np.float32)))
    first = [
        *gradients(runs=["run-1"]),
        operation(1, "run-2", group=1, forward_backward=bad),
        operation(1, "run-3", group=1, forward_backward=nothing),
        operation(1, "run-4", group=1, **forward_backward()),
        operation(1, "run-1", epoch=7, group=1, **forward_backward(), operation_id="op-stale"),
        operation(1, "run-x", group=1, **forward_backward()),
    ]
    outcomes = driver.run(*first, *updates(), runs=[*assignments(), assignment("run-4")])
    assert losses([outcomes[0], outcomes[3]]) == [2.49] * 2
    failed = [reason(outcomes[place]) for place in (1, 2, 4, 5)]
    assert failed == ["INVALID_BATCH", "NOTHING_SCORED", "INTERNAL", "INTERNAL"]
    assert outcomes[6].result.optim_step.applied
    assert [reason(outcome) for outcome in outcomes[7:]] == ["WINDOW_POISONED"] * 2
    assert "run run-1 is not held under epoch 7" in caplog.text


def test_a_run_that_could_not_be_taken_on_fails_by_itself(driver):
    unfit = assignment("run-2", lora=training_pb2.LoraConfig(bias="all"))
    outcomes = driver.run(*gradients(), runs=[assignment("run-1"), unfit, assignment("run-3")])
    assert reason(outcomes[1]) == "UNSUPPORTED_OPTION"
    assert losses([outcomes[0], outcomes[2]]) == [2.49] * 2


def test_a_run_that_is_given_up_leaves_the_others_alone(driver):
    lost = assignment("run-2", artifact_id="art-none")
    outcomes = driver.run(*gradients(), runs=[assignment("run-1"), lost, assignment("run-3")])
    assert outcomes[1] is None
    assert [one.run_id for one in driver.executor.collect_refused()] == ["run-2"]
    assert losses([outcomes[0], outcomes[2]]) == [2.49] * 2


def test_voids_and_replays_keep_their_places(driver):
    outcomes = driver.run(
        *gradients(runs=["run-1"], replay=True),
        *updates(runs=["run-1"]),
        *gradients(runs=["run-2"], void=True, group=2),
        *updates(runs=["run-2"]),
        *gradients(runs=["run-3"]),
        *updates(runs=["run-3"]),
        runs=assignments(),
    )
    assert outcomes[2] is None
    assert outcomes[1].result.optim_step.step == outcomes[5].result.optim_step.step == 1
    assert reason(outcomes[3]) == "WINDOW_POISONED"
    assert driver.backend.together == [("updates", [*RUNS])]


def test_gradients_of_a_deterministic_run_are_computed_alone(driver):
    runs = [*assignments(RUNS[:2]), assignment("run-3", deterministic=True)]
    outcomes = driver.run(*gradients(), *updates(), runs=runs)
    assert all(outcome.HasField("result") for outcome in outcomes)
    assert driver.backend.together == [("gradients", ["run-1", "run-2"]), ("updates", [*RUNS])]


def test_what_is_sent_again_gets_its_first_answer_and_the_others_go_on(driver):
    (first,) = driver.run(*gradients(runs=["run-1"]), runs=assignments())
    driver.executor.new_stream()
    outcomes = driver.run(*gradients())
    assert outcomes[0] == first
    assert driver.backend.together == [("gradients", ["run-2", "run-3"])]
    assert losses(outcomes) == [2.49] * 3


def test_an_unexpected_exception_keeps_its_text_and_later_operations_run(
    driver, caplog, monkeypatch
):
    with monkeypatch.context() as patch:

        def explode(entries):
            raise ValueError("secret path /data/tenants")

        patch.setattr(driver.backend, "forward_backward_group", explode)
        outcomes = driver.run(*gradients(), runs=assignments())
    assert [reason(outcome) for outcome in outcomes] == ["INTERNAL"] * 3
    assert not any("secret" in outcome.error.message for outcome in outcomes)
    assert "secret path" in caplog.text
    assert losses(driver.run(*gradients(seq=2))) == [2.49] * 3


class ReferringBackend(RecordingBackend):
    """Notes what each call is compared with: the artifact and what its file says."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[tuple[str, str]] = []

    def _noted(self, request):
        artifact = request.reference and request.reference.artifact
        if artifact is not None:
            said = (artifact.directory / "weights").read_text()
            self.references.append((artifact.artifact_id, said))
        return replace(request, reference=None)

    def forward_backward(self, run_id, seq, request):
        return super().forward_backward(run_id, seq, self._noted(request))

    def forward_backward_group(self, entries):
        return super().forward_backward_group(
            [(run_id, seq, self._noted(request)) for run_id, seq, request in entries]
        )


def compared(seq: int, names: dict[str, str]):
    """A gradient of each run, compared with its artifact."""
    return [
        operation(
            seq,
            run,
            group=seq,
            **forward_backward(loss=losses_pb2.LossConfig(reference={"artifact_id": name})),
        )
        for run, name in names.items()
    ]


def test_calls_that_compare_with_an_artifact_find_company_once_it_is_here(tmp_path):
    for name in ("art-1", "art-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(f"of {name}")
    transfers = FolderTransfers(tmp_path)
    driver = Driver(backend := ReferringBackend(), transfers)
    try:
        own = {"run-1": "art-1", "run-2": "art-2", "run-3": "art-1"}
        outcomes = driver.run(*compared(1, own), runs=assignments())
        assert backend.together == []  # nobody waits for another's transfer
        assert transfers.fetched == ["art-1", "art-2"]
        outcomes += driver.run(*compared(2, own))
        assert backend.together == [("gradients", [*RUNS])]
        assert transfers.fetched == ["art-1", "art-2"]
        assert losses(outcomes) == [2.49] * 6
        expected = [(name, f"of {name}") for name in own.values()]
        assert backend.references == expected * 2
    finally:
        driver.executor.close()


class GatedBackend(RecordingBackend):
    """Stops in every group until it is let go."""

    instant = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)

    def forward_backward_group(self, entries):
        assert self.gate.acquire(timeout=10)
        return super().forward_backward_group(entries)


@pytest.fixture
def gated(tmp_path):
    driver = Driver(backend := GatedBackend(), FolderTransfers(tmp_path))
    driver.backend = backend
    yield driver
    backend.gate.release(100)
    driver.executor.close()


def test_all_of_a_group_are_reported_started_and_what_comes_later_joins_the_next(gated):
    first = gradients(runs=RUNS[:2])
    gated.executor.submit(plan(*first, runs=assignments()))
    gated.until(lambda: gated.started == [item.operation_id for item in first])
    gated.executor.submit(plan(*gradients(2, RUNS[:2], seq=2)))
    gated.executor.submit(plan(*gradients(2, ["run-3"])))
    gated.backend.gate.release(2)
    gated.until(lambda: len(gated.done) == 5)
    assert gated.backend.together == [("gradients", [*RUNS[:2]]), ("gradients", [*RUNS])]
    gated.until(lambda: gated.executor.idle)


def test_a_cancelled_member_does_not_run_and_its_window_is_poisoned(gated):
    gated.executor.submit(plan(*gradients(runs=RUNS[:2]), runs=assignments()))
    gated.until(lambda: len(gated.started) == 2)
    gated.executor.submit(plan(*gradients(2, seq=2), *updates(3, seq=3)))
    gated.executor.cancel("op-run-2-2")
    gated.executor.cancel("op-run-2-1")  # it runs: too late
    gated.backend.gate.release(2)
    gated.until(lambda: gated.executor.idle)
    gated.collect()
    assert gated.done["op-run-2-2"].cancelled
    assert not gated.done["op-run-2-1"].cancelled
    assert gated.backend.together[1] == ("gradients", ["run-1", "run-3"])
    assert reason(gated.done["op-run-2-3"]) == "WINDOW_POISONED"
    assert gated.done["op-run-1-3"].result.optim_step.applied


def test_one_pass_has_one_kind_one_model_and_each_run_once():
    def member(run: str, kind: str) -> Member:
        planned = operation(1, run, group=1, **OPTIM)
        spec = training_pb2.OperationSpec.FromString(planned.spec)
        return Member(planned, spec, kind)

    runs = {"a": HeldRun(1, "m"), "b": HeldRun(1, "m"), "c": HeldRun(1, "n")}
    members = [
        member(run, kind)
        for run, kind in [
            ("a", "optim_step"),
            ("b", "forward_backward"),
            ("c", "optim_step"),
            ("a", "forward_backward"),
            ("a", "forward_backward"),
        ]
    ]
    found = [[(m.spec.run_id, m.kind) for m in each] for each in passes(members, runs)]
    assert found == [
        [("a", "optim_step")],
        [("b", "forward_backward"), ("a", "forward_backward")],
        [("c", "optim_step")],
        [("a", "forward_backward")],
    ]
