"""A message of very many parts is refused before a rule is applied to each of them."""

from __future__ import annotations

from typing import Any

import pytest

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as pb
from tensafe.wire.status import TenSafeFault
from tensafe_server.operations import validation
from tensafe_server.operations.intake import _turns
from tensafe_server.operations.parts import crowded_field
from tensafe_server.operations.validation import check_rules


class Watched:
    """The validator, and how often all broken rules of a message were asked for."""

    def __init__(self, validator: Any) -> None:
        self.validator = validator
        self.calls = 0
        self.whole = 0

    def collect_violations(self, message: Any, *, fail_fast: bool = False) -> Any:
        self.calls += 1
        self.whole += not fail_fast
        return self.validator.collect_violations(message, fail_fast=fail_fast)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    spy = Watched(validation._validator)
    monkeypatch.setattr(validation, "_validator", spy)
    return spy


def chat(messages: int, **content: str) -> pb.Sample:
    message = pb.ChatMessage(**content)  # type: ignore[arg-type]
    return pb.Sample(prompts=[pb.Prompt(chat=pb.Chat(messages=[message] * messages))])


CROWDS = {
    "unit ids": pb.Batch(unit_ids=[""] * 1_000),
    "messages": chat(1_000),
    "stop tokens": pb.Sample(params=pb.SamplingParams(stop=pb.Stop(tokens=[-1] * 1_000))),
    "prompts": pb.Sample(prompts=[pb.Prompt()] * 5_000),
    "states": ops.ListOperationsRequest(states=[99] * 1_000),  # type: ignore[list-item]
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_a_crowd_is_told_of_its_first_fault(watched: Watched, crowd: str):
    with pytest.raises(TenSafeFault) as caught:
        check_rules(CROWDS[crowd])
    assert caught.value.detail.reason == "INVALID_ARGUMENT"
    assert len(caught.value.detail.violations) == 1
    assert watched.whole == 0


def test_a_few_are_told_of_every_fault(watched: Watched):
    with pytest.raises(TenSafeFault) as caught:
        check_rules(chat(3))
    assert [field for field, _ in caught.value.detail.violations] == [
        f"prompts[0].chat.messages[{index}].role" for index in range(3)
    ]
    assert watched.whole == 1


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (chat(40_000, role="user", content="?"), "prompts[0].chat.messages"),
        (pb.Sample(prompts=[pb.Prompt(text="a")] * 40_000), "prompts"),
        (ops.ListOperationsRequest(states=[2] * 3_000_000), "states"),
    ],
)
def test_what_has_too_many_parts_is_refused_before_any_rule(
    watched: Watched, message: Any, field: str
):
    with pytest.raises(TenSafeFault, match="split") as caught:
        check_rules(message, "call.")
    assert [named for named, _ in caught.value.detail.violations] == [f"call.{field}"]
    assert watched.calls == 0


@pytest.mark.parametrize(
    "message",
    [
        pb.Batch(unit_ids=["somebody"] * 1_048_576),
        pb.Sample(prompts=[pb.Prompt(text="x" * 100)] * 4_096),
        chat(30_000, role="user", content="?"),
        # Each of a call's operations is checked by itself.
        pb.SubmitBatchRequest(
            operations=[pb.OperationSpec(sample=chat(9_000, role="user", content="?"))] * 4
        ),
    ],
    ids=["unit ids", "prompts", "messages", "operations"],
)
def test_the_most_that_is_right_is_taken(message: Any):
    if isinstance(message, pb.Batch):
        for tensor in (message.offsets, message.input_tokens):
            tensor.data = b"1"
    check_rules(message)


def test_parts_of_maps_are_counted():
    saved = pb.SaveState()
    saved.metadata.update({"a": 1, "b": {"c": [1, 2, 3]}})
    assert crowded_field(saved, 6) == ""
    assert crowded_field(saved, 5) != ""


def test_scalars_count_less():
    stop = pb.Stop(tokens=[1] * 128)
    assert crowded_field(stop, 127) == "tokens"
    assert crowded_field(stop, 2, scalars=64) == ""
    assert crowded_field(stop, 1, scalars=64) == "tokens"


def test_a_call_of_many_prompts_is_cut():
    few = pb.OperationSpec(sample=pb.Sample(prompts=[pb.Prompt(text="a")] * 1_500))
    many = pb.OperationSpec(sample=pb.Sample(prompts=[pb.Prompt(text="a")] * 4_096))
    other = pb.OperationSpec(optim_step=pb.OptimStep())
    specs = [other, few, few, few, other, many, many, other]
    assert [len(part) for part in _turns(specs)] == [3, 2, 1, 2]
    assert [spec for part in _turns(specs) for spec in part] == specs
    assert [len(part) for part in _turns([other] * 1_024)] == [1_024]
