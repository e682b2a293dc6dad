"""What `runs verify` says of a report."""

from __future__ import annotations

import pytest

from tensafe.v1.training_pb2 import VerifyReport as Message
from tensafe_client.cli.verifying import _verdict
from tensafe_client.infos import VerifyReport


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"replayed": 3, "exact": 3}, "It gives the recorded results."),
        ({"replayed": 3, "mismatches": 1}, "does not give the recorded results: 1 differ"),
        ({"from_seq": 9, "to_seq": 9}, "this shows nothing"),
    ],
)
def test_a_verdict_claims_what_was_compared(counts: dict[str, int], says: str):
    assert says in _verdict(VerifyReport.from_proto("run-1", Message(**counts)))
