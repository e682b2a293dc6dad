"""What ended where it waits costs no more than what waits, and its holes stay known."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe_server.operations.ledger import Ledger
from tensafe_server.operations.model import CANCELLED, QUEUED, PendingOperation, run_state
from tensafe_server.operations.voids import is_void
from tensafe_server.store.base import OperationRow, RunRow

RUN = "run-1"
GRADIENT, UPDATE = ops.OPERATION_KIND_FORWARD_BACKWARD, ops.OPERATION_KIND_OPTIM_STEP


def ledger(voids_kept: int) -> Ledger:
    made = Ledger(voids_kept=voids_kept)
    config = training.RunConfig().SerializeToString()
    made.runs[RUN] = run_state(RunRow(RUN, "ten-1", "m", config, 1, 0, 0, None, 0, 1))
    return made


def admit(book: Ledger, kinds: list[int]) -> list[PendingOperation]:
    run = book.runs[RUN]
    added = []
    for seq, kind in enumerate(kinds, run.next_seq):
        row = OperationRow(
            id=f"op-{seq}",
            tenant_id="ten-1",
            run_id=RUN,
            seq=seq,
            request_id=None,
            session_id="",
            kind=kind,
            state=QUEUED,
            executed=False,
            spec_hash=b"",
            spec=None,
            spec_ref=None,
            artifact_id=None,
            cost=1,
            created_ns=1,
        )
        added.append(PendingOperation(row, b"spec", "m"))
        book.reserve(added[-1], run)
    book.admit(added)
    return added


def end(book: Ledger, operation: PendingOperation) -> None:
    """It is cancelled where it waits."""
    book.void(operation)
    operation.row.state = CANCELLED
    book.retire(operation)


def test_however_much_is_cancelled_behind_what_waits_the_queue_stays_short():
    book = ledger(256)
    run = book.runs[RUN]
    [blocked] = admit(book, [GRADIENT])
    for _ in range(100):
        for operation in reversed(admit(book, [GRADIENT, UPDATE] * 50)):
            end(book, operation)
        assert len(run.queue) <= 3 * 256
    assert book.unfinished == 1
    assert run.queue[0] is blocked
    assert run.next_seq == 10_002
    assert run.reached_seq == 0


def test_what_waited_between_the_cancelled_is_merged_when_it_is_cancelled_too():
    book = ledger(0)
    operations = admit(book, [GRADIENT] * 101)
    for operation in (*operations[::2], *operations[1::2]):
        end(book, operation)
    assert len(book.runs[RUN].queue) <= 2


def test_a_deleted_runs_queue_is_emptied():
    book = ledger(256)
    run = book.runs[RUN]
    operations = admit(book, [GRADIENT] * 10)
    run.status = training.RUN_STATUS_DELETED
    for operation in operations:
        end(book, operation)
    assert not run.queue


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([GRADIENT, UPDATE]), st.booleans()), max_size=30),
    st.integers(0, 3),
    st.randoms(),
)
def test_between_what_waits_the_same_windows_have_holes(
    plan: list[tuple[int, bool]], voids_kept: int, order: object
):
    book = ledger(voids_kept)
    run = book.runs[RUN]
    operations = admit(book, [kind for kind, _ in plan])
    ending = [one for one, (_, cancelled) in zip(operations, plan, strict=True) if cancelled]
    order.shuffle(ending)  # type: ignore[attr-defined]
    for operation in ending:
        end(book, operation)

    def course(items: list[PendingOperation]) -> list[str]:
        """What is executed, and where a worker hears of a hole, told once or more often."""
        heard: list[str] = []
        for item in items:
            if not item.void:
                heard.append(item.row.id)
            elif is_void(item.row, private=False) and heard[-1:] != ["hole"]:
                heard.append("hole")
        return heard

    assert course(list(run.queue)) == course(operations)
    covered = [seq for one in run.queue for seq in range(one.seqs[0], one.seqs[1] + 1)]
    assert covered == list(range(1, len(plan) + 1))
    assert run.reached_seq == 0
    waiting = len(plan) - len(ending)
    assert len(run.queue) <= 2 * max(voids_kept, len(ending)) + waiting + 1
    if voids_kept == 0 and len(ending) == len(plan):
        assert len(run.queue) <= 2
