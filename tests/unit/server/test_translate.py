"""What callers see of an operation's row."""

from __future__ import annotations

from small_store import operation

from tensafe.v1 import operations_pb2 as ops
from tensafe_server.events.translate import bare_operation


def test_a_fingerprint_is_told_but_where_company_would_tell_what_was_drawn():
    row = operation(1, fingerprint="0123456789abcdef")
    assert bare_operation(row).fingerprint == "0123456789abcdef"
    row.fingerprint = None  # it had company
    assert bare_operation(row).fingerprint == ""
    for kind in (ops.OPERATION_KIND_PRIVATE_STEP, ops.OPERATION_KIND_SAMPLE):
        row = operation(2, kind=kind, fingerprint="0123456789abcdef")
        assert bare_operation(row).fingerprint == ""
