"""docs/errors.md, the proto's enum and the table in tensafe.wire.status say the same."""

import re
from pathlib import Path

from tensafe.v1 import errors_pb2
from tensafe.wire.status import CODES, REASON_CODES

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| (.+?) \| (.+?) \|$", re.M)
COMMENT = re.compile(r"// ([A-Z_]+): [^=]*?\n  ERROR_REASON_([A-Z_]+) = \d+;", re.S)


def documented() -> dict[str, str]:
    rows = ROW.findall((ROOT / "docs/errors.md").read_text())
    reasons = [reason for reason, *_ in rows]
    assert len(reasons) == len(set(reasons)), "a reason stands twice"
    return {reason: code for reason, code, *_ in rows}


def enumerated() -> set[str]:
    names = {
        name.removeprefix("ERROR_REASON_")
        for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name
    }
    return names - {"UNSPECIFIED"}


def test_every_reason_is_documented_with_its_code():
    assert documented() == REASON_CODES


def test_every_reason_of_the_enum_has_a_code():
    assert set(REASON_CODES) == enumerated()
    assert set(REASON_CODES.values()) <= set(CODES)


def test_the_proto_comments_name_the_same_codes():
    text = (ROOT / "protos/tensafe/v1/errors.proto").read_text()
    commented = {reason: code for code, reason in COMMENT.findall(text)}
    assert commented == REASON_CODES
