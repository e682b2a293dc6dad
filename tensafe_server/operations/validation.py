"""The rules in the protos, applied: one validator for requests and for single operations."""

from __future__ import annotations

from collections.abc import Iterable

import protovalidate
from google.protobuf.message import Message

from tensafe.wire.status import TenSafeFault

_validator = protovalidate.Validator()


def check_rules(message: Message, prefix: str = "") -> None:
    """Applies a message's declared rules.

    Raises:
        TenSafeFault: INVALID_ARGUMENT, with every broken rule by field; `prefix` is put before the
            fields' names.
    """
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
