"""What bad input gets: the right error, and nothing else disturbed.

Each case has a run of its own. The error must name the field and say what to do; then the same run
must go on with its next operation. What another tenant trains meanwhile must not change by a bit.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from harness import wire
from harness.tiny_model import CONTEXT_LENGTH, VOCABULARY_SIZE
from local_service import LocalService

from tensafe.v1 import training_pb2 as pb
from tensafe.wire.channel import MAX_MESSAGE_BYTES
from tensafe.wire.status import REASON_CODES
from tensafe_client import Datum, ServiceClient, TenSafeError, TrainingClient

NewTenant = Callable[[], ServiceClient]
CONFIG: dict[str, Any] = {"model_ref": "tiny", "lora_config": {"rank": 4}, "seed": 7}
GOOD_BATCH = [Datum([5, 6, 7, 8], [6, 7, 8, 9]), Datum([9, 8, 7], [8, 7, 6])]


@dataclass(frozen=True)
class Expected:
    """What the error must be: gRPC code, reason, and patterns for the field and the remedy."""

    code: str
    reason: str
    names: str
    remedy: str


def make_run(client: ServiceClient, **changes: Any) -> TrainingClient:
    return client.create_training_client({**CONFIG, **changes})


def goes_on(run: TrainingClient) -> None:
    before = run.refresh().step
    passed, updated = run.forward_backward(GOOD_BATCH), run.optim_step()
    assert np.isfinite(passed.result().loss)
    assert updated.result().step == before + 1


# Bad configurations: no run comes of them.

BAD_CONFIGS = {
    "unknown model": (
        {"model_ref": "no-such-model"},
        Expected("NOT_FOUND", "MODEL_NOT_FOUND", "no-such-model", r"models"),
    ),
    "a path as model": (
        {"model_ref": "/etc"},
        Expected("NOT_FOUND", "MODEL_NOT_FOUND", "/etc", r"models"),
    ),
    "rank 0": (
        {"lora_config": {"rank": 0}},
        Expected("INVALID_ARGUMENT", "INVALID_ARGUMENT", r"lora\.rank", r"1"),
    ),
    "rank 10,000": (
        {"lora_config": {"rank": 10_000}},
        Expected("INVALID_ARGUMENT", "INVALID_ARGUMENT", r"lora\.rank", r"1024"),
    ),
    "rank 100,000": (
        {"lora_config": {"rank": 100_000}},
        Expected("INVALID_ARGUMENT", "INVALID_ARGUMENT", r"lora\.rank", r"1024"),
    ),
    "a module that the model lacks": (
        {"lora_config": {"target_modules": ["q_proj", "no_proj"]}},
        Expected("INVALID_ARGUMENT", "UNKNOWN_TARGET_MODULE", "no_proj", r"q_proj"),
    ),
    "a NaN learning rate": (
        {"optimizer": {"learning_rate": float("nan")}},
        Expected("INVALID_ARGUMENT", "INVALID_ARGUMENT", r"learning_rate", r"finite"),
    ),
    "bias": (
        {"lora_config": {"bias": "all"}},
        Expected("INVALID_ARGUMENT", "INVALID_ARGUMENT", r"bias", r"none"),
    ),
    "betas for sgd": (
        {"optimizer": {"name": "sgd", "betas": (0.9, 0.99)}},
        Expected("INVALID_ARGUMENT", "UNSUPPORTED_OPTION", r"beta", r"sgd"),
    ),
    "differential privacy without a dataset or noise": (
        {"dp_config": {"enabled": True}},
        Expected("INVALID_ARGUMENT", "INVALID_ARGUMENT", r"dataset_id", r"noise_multiplier"),
    ),
    "a dataset that is not there": (
        {
            "dp_config": {
                "sampling": "server_poisson",
                "dataset_id": "ds-none",
                "noise_multiplier": 1.0,
            }
        },
        Expected("NOT_FOUND", "DATASET_NOT_FOUND", r"ds-none", r"datasets upload"),
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(new_tenant: NewTenant, case: str):
    changes, expected = BAD_CONFIGS[case]
    client = new_tenant()
    with pytest.raises(TenSafeError) as caught:
        make_run(client, **changes)
    check(caught.value, expected)
    assert client.runs() == []


def test_an_unknown_field_names_the_closest(new_tenant: NewTenant):
    client = new_tenant()
    with pytest.raises(TenSafeError, match=r"lora_config\.rnak.*did you mean 'rank'"):
        make_run(client, lora_config={"rnak": 4})
    assert client.runs() == []


# Bad operations: the run goes on, whether the SDK refuses them or the server does.


def far_token(run: TrainingClient) -> Any:
    return run.forward_backward([Datum([5, VOCABULARY_SIZE], [6, 7])]).result()


def far_target(run: TrainingClient) -> Any:
    return run.forward_backward([Datum([5, 6], [6, 2**31 - 1])]).result()


def all_ignored(run: TrainingClient) -> Any:
    return run.forward_backward({"input_ids": [[1, 2, 3]], "labels": [[-100] * 3]}).result()


def all_weights_zero(run: TrainingClient) -> Any:
    return run.forward_backward([Datum([5, 6], [6, 7], [0.0, 0.0])]).result()


def ragged(run: TrainingClient) -> Any:
    return run.forward_backward({"input_ids": [[1, 2, 3], [1, 2]], "labels": [[1, 2, 3]]}).result()


def empty(run: TrainingClient) -> Any:
    return run.forward_backward([]).result()


def beyond_context(run: TrainingClient) -> Any:
    length = CONTEXT_LENGTH + 1
    return run.forward_backward([Datum([5] * length, [6] * length)]).result()


def beyond_message_limit(run: TrainingClient) -> Any:
    length = MAX_MESSAGE_BYTES // 4
    tokens = np.full(length, 5)
    return run.forward_backward([Datum(tokens, tokens)]).result()


def nan_learning_rate(run: TrainingClient) -> Any:
    return run.optim_step(learning_rate=float("nan")).result()


def unknown_artifact(run: TrainingClient) -> Any:
    return run.load_state("art-no-such-artifact")


def text_beyond_context(run: TrainingClient) -> Any:
    return run.sample("a" * 1_000_000)


def chat_beyond_context(run: TrainingClient) -> Any:
    return run.sample([[{"role": "user", "content": "a" * 1_000_000}]])


def unknown_loss(run: TrainingClient) -> Any:
    return run.forward_backward(GOOD_BATCH, loss_fn="no_such_loss").result()


BAD_OPERATIONS = {
    far_token: Expected(
        "OUT_OF_RANGE", "TOKEN_OUT_OF_RANGE", str(VOCABULARY_SIZE), r"tokenizer|below"
    ),
    far_target: Expected(
        "OUT_OF_RANGE", "TOKEN_OUT_OF_RANGE", r"target_tokens", r"tokenizer|below"
    ),
    all_ignored: Expected("INVALID_ARGUMENT", "NOTHING_SCORED", r"labels|weights", r"."),
    all_weights_zero: Expected("INVALID_ARGUMENT", "NOTHING_SCORED", r"weights", r"."),
    ragged: Expected("INVALID_ARGUMENT", "INVALID_BATCH", r"input_ids|labels", r"."),
    empty: Expected("INVALID_ARGUMENT", "INVALID_BATCH", r"batch", r"."),
    beyond_context: Expected(
        "OUT_OF_RANGE", "CONTEXT_EXCEEDED", str(CONTEXT_LENGTH), r"truncate|shorten|split"
    ),
    text_beyond_context: Expected(
        "OUT_OF_RANGE", "CONTEXT_EXCEEDED", r"prompts\[0\] has 1000000 characters", r"shorten"
    ),
    chat_beyond_context: Expected(
        "OUT_OF_RANGE", "CONTEXT_EXCEEDED", r"prompts\[0\] has \d+ characters", r"shorten"
    ),
    beyond_message_limit: Expected(
        "INVALID_ARGUMENT", "MESSAGE_TOO_LARGE", str(MAX_MESSAGE_BYTES), r"split|smaller"
    ),
    nan_learning_rate: Expected(
        "INVALID_ARGUMENT", "INVALID_ARGUMENT", r"learning_rate", r"finite"
    ),
    unknown_artifact: Expected(
        "NOT_FOUND", "ARTIFACT_NOT_FOUND", "art-no-such-artifact", r"artifacts"
    ),
    unknown_loss: Expected(
        "INVALID_ARGUMENT", "UNSUPPORTED_OPTION", r"no_such_loss", r"cross_entropy"
    ),
}


LEAVE_THE_WINDOW = {
    nan_learning_rate,
    unknown_artifact,
    text_beyond_context,
    chat_beyond_context,
}


@pytest.mark.parametrize("act", BAD_OPERATIONS, ids=lambda act: act.__name__)
def test_bad_operation(new_tenant: NewTenant, act: Callable[[TrainingClient], Any]):
    run = make_run(new_tenant())
    goes_on(run)
    with pytest.raises(TenSafeError) as caught:
        act(run)
    check(caught.value, BAD_OPERATIONS[act])
    if act not in LEAVE_THE_WINDOW:
        drop_window(run)
    goes_on(run)


def drop_window(run: TrainingClient) -> None:
    """A forward_backward that was refused poisons its window; the next one is clean."""
    run.forward_backward(GOOD_BATCH)
    seen = run.optim_step().exception()
    assert isinstance(seen, TenSafeError)
    assert seen.reason == "WINDOW_POISONED"


def test_operation_on_a_deleted_run(new_tenant: NewTenant):
    client = new_tenant()
    run = make_run(client)
    goes_on(run)
    client.delete_run(run.run_id)
    for act in (lambda: run.forward_backward(GOOD_BATCH), run.optim_step):
        error = act().exception()
        assert isinstance(error, TenSafeError)
        check(error, Expected("FAILED_PRECONDITION", "RUN_DELETED", run.run_id, r"creat|another"))
    goes_on(make_run(client))


# The same over the wire, where no SDK stands before the server.


def offsets_beyond(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(wire.int64([0, 4]), wire.int32([1, 2]), target_tokens=wire.int32([2, 3]))
    return wire.forward_backward(run_id, seq, content)


def no_datums(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(wire.int64([0]), wire.int32([]), target_tokens=wire.int32([]))
    return wire.forward_backward(run_id, seq, content)


def short_targets(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(
        wire.int64([0, 3]), wire.int32([1, 2, 3]), target_tokens=wire.int32([2, 3])
    )
    return wire.forward_backward(run_id, seq, content)


def no_targets(run_id: str, seq: int) -> pb.OperationSpec:
    return wire.forward_backward(run_id, seq, wire.batch(wire.int64([0, 2]), wire.int32([1, 2])))


def nan_weight(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(
        wire.int64([0, 2]),
        wire.int32([1, 2]),
        target_tokens=wire.int32([2, 3]),
        weights=wire.float32([1.0, float("nan")]),
    )
    return wire.forward_backward(run_id, seq, content)


def negative_token(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(wire.int64([0, 2]), wire.int32([1, -1]), target_tokens=wire.int32([2, 3]))
    return wire.forward_backward(run_id, seq, content)


def lying_shape(run_id: str, seq: int) -> pb.OperationSpec:
    tokens = wire.int32([1, 2])
    tokens.shape[0] = 2**40
    content = wire.batch(wire.int64([0, 2]), tokens, target_tokens=wire.int32([2, 3]))
    return wire.forward_backward(run_id, seq, content)


def wrong_type(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(
        wire.int64([0, 2]), wire.float32([1.0, 2.0]), target_tokens=wire.int32([2, 3])
    )
    return wire.forward_backward(run_id, seq, content)


def unscored(run_id: str, seq: int) -> pb.OperationSpec:
    content = wire.batch(
        wire.int64([0, 2]),
        wire.int32([1, 2]),
        target_tokens=wire.int32([2, 3]),
        weights=wire.float32([0.0, 0.0]),
    )
    return wire.forward_backward(run_id, seq, content)


def too_large(run_id: str, seq: int) -> pb.OperationSpec:
    length = MAX_MESSAGE_BYTES // 8 + 1
    content = wire.batch(
        wire.int64([0, length]), wire.int32([1] * length), target_tokens=wire.int32([2] * length)
    )
    return wire.forward_backward(run_id, seq, content)


RAW_OPERATIONS = {
    offsets_beyond: ("INVALID_BATCH", r"offsets"),
    no_datums: ("INVALID_BATCH", r"batch|offsets"),
    short_targets: ("INVALID_BATCH", r"target_tokens"),
    no_targets: ("INVALID_BATCH", r"target_tokens"),
    nan_weight: ("INVALID_BATCH", r"weights"),
    negative_token: ("TOKEN_OUT_OF_RANGE", r"input_tokens|token"),
    lying_shape: ("INVALID_BATCH", r"input_tokens|shape"),
    wrong_type: ("INVALID_BATCH", r"input_tokens|int32"),
    unscored: ("NOTHING_SCORED", r"weights"),
    too_large: ("MESSAGE_TOO_LARGE", r"16777216|16 MiB"),
}


@pytest.mark.parametrize("make", RAW_OPERATIONS, ids=lambda make: make.__name__)
def test_bad_operation_without_an_sdk(
    tiny_service: LocalService,
    new_key: Callable[[], str],
    make: Callable[[str, int], pb.OperationSpec],
):
    reason, names = RAW_OPERATIONS[make]
    key = new_key()
    with (
        ServiceClient(tiny_service.target, api_key=key) as client,
        wire.raw_client(tiny_service.target, key) as raw,
    ):
        run_id = make_run(client).run_id
        error = raw.submit(make(run_id, raw.next_seq(run_id)))
        if error is None:  # accepted, and refused by the worker
            operation = client.operations(run_id)[0]
            failed = client.future(operation.id).exception(timeout=60)
            assert isinstance(failed, TenSafeError)
            check(failed, Expected(REASON_CODES[reason], reason, names, r"."))
        else:
            assert (error.reason, error.code) == (reason, REASON_CODES[reason])
            assert re.search(names, error.message + str(error.violations))
        if reason != "MESSAGE_TOO_LARGE":
            assert raw.next_seq(run_id) == 2, "a refused operation consumes its seq"
        run = client.training_client(run_id)
        drop_window(run)
        goes_on(run)


# Somebody else's run.


def adapter_sha256(run: TrainingClient, client: ServiceClient) -> str:
    files = client.artifact(run.save_state().artifact_id).files
    return next(file.sha256 for file in files if file.name == "adapter_model.safetensors")


def train_alone(client: ServiceClient) -> tuple[list[float], str]:
    run = make_run(client, seed=11)
    sent = [(run.forward_backward(GOOD_BATCH), run.optim_step()) for _ in range(12)]
    losses = [passed.result().loss for passed, _ in sent]
    return losses, adapter_sha256(run, client)


@contextmanager
def misbehaving(client: ServiceClient) -> Iterator[None]:
    """Sends every bad operation again and again until the block ends."""
    over, failures, rounds = threading.Event(), list[BaseException](), [0]

    def go() -> None:
        try:
            run = make_run(client)
            while not over.is_set() or rounds[0] == 0:
                for act in BAD_OPERATIONS:
                    if act is not beyond_message_limit:
                        with pytest.raises(TenSafeError):
                            act(run)
                rounds[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures[0]
    assert rounds[0] > 0


def test_another_tenants_run_does_not_change_by_a_bit(new_tenant: NewTenant):
    honest, other = new_tenant(), new_tenant()
    alone = train_alone(honest)
    with misbehaving(other):
        beside = train_alone(honest)
    assert beside == alone


def check(error: TenSafeError, expected: Expected) -> None:
    """Checks code, reason, and that the text names the field and a remedy."""
    assert re.fullmatch(expected.code, error.code), repr(error)
    assert re.fullmatch(expected.reason, error.reason), repr(error)
    text = f"{error} {dict(error.metadata)} {error.violations}"
    assert re.search(expected.names, text), text
    assert re.search(expected.remedy, text, re.I), text
