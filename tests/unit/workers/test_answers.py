"""Which outcomes a worker keeps for operations that are sent again."""

from __future__ import annotations

from tensafe.v1.worker_pb2 import OperationDone
from workers.answers import Answers


def test_the_last_ones_are_kept_also_of_what_was_executed_again():
    answers = Answers(kept=2)
    for operation_id, epoch in [("op-1", 1), ("op-2", 1), ("op-1", 2), ("op-3", 1)]:
        answers.put(OperationDone(operation_id=operation_id, epoch=epoch), "run-1")
    kept = [(done.operation_id, done.epoch) for _, done in answers.all()]
    assert kept == [("op-1", 2), ("op-3", 1)]
