"""The protos keep their own rules: request ids, presence, and errors that are named."""

from __future__ import annotations

import re
from typing import Any

import pytest
from harness import rpcs

from tensafe.wire.status import TenSafeFault
from tensafe_server.operations.validation import check_rules

METHODS = {
    name.removeprefix("tensafe.v1."): method
    for name, method in rpcs.METHODS.items()
    if "WorkerService" not in name  # our own workers alone call it, with ids of another kind
}
# What changes nothing; what has another key to be known by again (a run and its seq, a file and its
# offset); and AttachRun, which twice is the same as once and of which the second must tell anew.
WITHOUT_REQUEST_ID = re.compile(
    r"/(Get|List|Watch|Wait|Stream|Verify|Download)|/(Submit|SubmitBatch|SubmitStream)$|/Upload\w*File$|/AttachRun$"
)


def comment(name: str) -> str:
    """What stands above an RPC, on one line."""
    service, method = name.split("/")
    for path in rpcs.PROTOS.glob("*.proto"):
        text = path.read_text()
        if f"service {service} {{" in text:
            inside = text.split(f"service {service} {{")[1]
            above = inside.split(f"  rpc {method}(")[0]
            lines = re.search(r"((?:  //.*\n)+)$", above)
            assert lines is not None, f"{name} has no comment"
            return " ".join(
                line.strip().removeprefix("//").strip() for line in lines[1].split("\n")
            )
    raise AssertionError(f"no proto has {name}")


@pytest.mark.parametrize("name", METHODS)
def test_a_mutation_takes_a_request_id(name: str):
    takes = "request_id" in METHODS[name].input_type.fields_by_name
    assert takes is not bool(WITHOUT_REQUEST_ID.search(f"/{name.split('/')[1]}"))


@pytest.mark.parametrize("name", METHODS)
def test_the_errors_of_its_fields_are_named(name: str):
    fields, said = METHODS[name].input_type.fields_by_name, comment(name)
    assert ("REQUEST_ID_CONFLICT" in said) == ("request_id" in fields)
    assert ("INVALID_PAGE_TOKEN" in said) == ("page_token" in fields)
    for field in ("run_id", "operation_id", "artifact_id", "dataset_id", "key_id"):
        if field in fields:
            assert f"{field.removesuffix('_id').upper()}_NOT_FOUND" in said, field


@pytest.mark.parametrize("name", METHODS)
def test_a_scalar_of_a_request_is_required_or_has_presence(name: str):
    request: Any = METHODS[name].input_type._concrete_class()
    required: set[str] = set()
    try:
        check_rules(request)
    except TenSafeFault as fault:
        required = {field for field, _ in fault.detail.violations}
    for field in METHODS[name].input_type.fields:
        if not field.is_repeated and not field.has_presence:
            assert field.name in required, field.name
