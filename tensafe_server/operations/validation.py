"""The rules in the protos, applied: one validator for requests and for single operations."""

from __future__ import annotations

from collections.abc import Iterable

import protovalidate
from google.protobuf.message import Message

from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.parts import crowded_field

_validator = protovalidate.Validator()
# Rules are applied to part after part, and each that is broken takes ten times as long, while
# every other caller waits: so the parts are counted before, and a crowd is told of its first fault.
_SMALL_BYTES = 64 * 1024
_MOST_PARTS = 32_768
_SCALARS_IN_A_PART = 64
_FEW_PARTS = 64


def check_rules(message: Message, prefix: str = "", *, size: int | None = None) -> None:
    """Applies a message's declared rules.

    Args:
        prefix: put before the fields' names.
        size: its bytes on the wire, for whoever knows them: to count them is to serialize it.

    Raises:
        TenSafeFault: INVALID_ARGUMENT, with every broken rule by field, or in a message of many
            parts with the first.
    """
    if (message.ByteSize() if size is None else size) > _SMALL_BYTES:
        field = crowded_field(message, _MOST_PARTS, scalars=_SCALARS_IN_A_PART)
        if field:
            rule = f"the call has more than {_MOST_PARTS} parts with it; split it over several"
            raise refused([(prefix + field, rule)])
    violations = _validator.collect_violations(message, fail_fast=True)
    if violations and not crowded_field(message, _FEW_PARTS):
        violations = _validator.collect_violations(message)
    if violations:
        raise refused((prefix + _path(v.proto.field), v.proto.message) for v in violations)


def refused(violations: Iterable[tuple[str, str]]) -> TenSafeFault:
    """INVALID_ARGUMENT for a list of (field, what it must be)."""
    listed = list(dict.fromkeys(violations))
    text = "; ".join(f"{field}: {rule}" for field, rule in listed[:4])
    return TenSafeFault("INVALID_ARGUMENT", text, violations=listed)


def _path(field: object) -> str:
    path = ""
    for element in getattr(field, "elements", ()):
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None:
            value = getattr(subscript, "value", subscript)
            path += f"[{value}]"
    return path
