"""Faults of the server, of the SDK and of arguments: typed errors, and never an endless wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_server import API_KEY, FakeCoordinator
from google.protobuf import struct_pb2

from tensafe_client import (
    AsyncServiceClient,
    ClientClosedError,
    ConfigError,
    InvalidArgumentError,
    SequenceGapError,
    ServerError,
    ServiceClient,
    TenSafeError,
    TrainingClient,
)
from tensafe_client.cli.output import to_jsonable
from tensafe_client.open_operations import OpenOperations
from tensafe_client.results import to_dict
from tensafe_client.session import Session

LONE = "half \ud83d of a pair"


def nested(levels: int) -> dict[str, Any]:
    """Returns a dict with so many levels below it."""
    value: dict[str, Any] = {"x": 1}
    for _ in range(levels - 1):
        value = {"x": value}
    return value


def test_metadata_is_bounded_in_depth(tc: TrainingClient, server: FakeCoordinator) -> None:
    assert tc.save_state(metadata=nested(16)).metadata == nested(16)
    endless: dict[str, Any] = {}
    endless["itself"] = endless
    for deep in (nested(17), nested(34), nested(2000), endless):
        with pytest.raises(InvalidArgumentError, match=r"metadata.*16 levels") as caught:
            tc.save_state_async(metadata=deep)
        assert "json.dumps" in str(caught.value)
    assert len(server.stored) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_metadata_holds_finite_numbers_only(tc: TrainingClient, number: float) -> None:
    with pytest.raises(InvalidArgumentError, match=r"metadata.rates\[1\].*\n.*string"):
        tc.save_state_async(metadata={"rates": [0.5, number]})


def test_metadata_of_other_clients_can_be_read() -> None:
    struct = struct_pb2.Struct()
    struct.update({"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}], "n": 3, "x": 0.5})
    struct.update({"none": None, "yes": True, "text": "t"})
    struct.fields["unset"].SetInParent()
    plain = to_dict(struct)
    assert plain == {
        "a": "NaN",
        "b": ["Infinity", {"c": "-Infinity"}],
        "n": 3,
        "x": 0.5,
        "none": None,
        "yes": True,
        "text": "t",
        "unset": None,
    }
    assert isinstance(plain["n"], int)
    assert to_jsonable(plain) == plain


def test_a_fault_that_passes_is_not_noticed(tc: TrainingClient, server: FakeCoordinator) -> None:
    server.internal_errors = 4
    assert tc.optim_step().result(timeout=20).step == 1
    assert tc.optim_step().result(timeout=20).step == 2


def test_a_fault_that_stays_ends_the_run_until_it_is_attached(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    assert tc.optim_step().result(timeout=20).step == 1
    server.internal_errors = 5
    server.gate.clear()
    futures = [tc.optim_step() for _ in range(600)]
    server.gate.set()
    with pytest.raises(ServerError, match="error id 1"):
        futures[0].result(timeout=20)
    with pytest.raises(SequenceGapError, match="training_client"):
        futures[-1].result(timeout=20)
    for future in futures:
        assert isinstance(future.exception(timeout=20), TenSafeError)
    with pytest.raises(SequenceGapError, match="error id 1"):
        tc.optim_step()
    other = client.create_training_client({"model_ref": "m"})
    assert other.optim_step().result(timeout=20).step == 1
    client.training_client(tc.run_id)
    again = tc.optim_step()
    assert (again.seq, again.result(timeout=20).step) == (2, 2)


def test_an_unexpected_error_of_the_submitter(
    client: ServiceClient, tc: TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_self: Session, _request: bytes) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "submit_batch", broken)
        with pytest.raises(TenSafeError, match="a bug"):
            tc.optim_step().result(timeout=20)
    assert client.training_client(tc.run_id).optim_step().result(timeout=20).step == 1


def test_an_unexpected_error_of_the_watcher(
    client: ServiceClient,
    tc: TrainingClient,
    server: FakeCoordinator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_self: OpenOperations, _operation: Any) -> None:
        raise RuntimeError("a bug")

    server.hold = True
    open_one = tc.optim_step()
    with monkeypatch.context() as patch:
        patch.setattr(OpenOperations, "finished", broken)
        server.hold = False
        with pytest.raises(TenSafeError, match="a bug"):
            tc.optim_step().result(timeout=20)
        with pytest.raises(TenSafeError, match="a bug"):
            open_one.result(timeout=20)
    assert client.sample("hi", model="m").samples


def test_a_key_is_stripped(server: FakeCoordinator) -> None:
    with ServiceClient(f"127.0.0.1:{server.port}", api_key=f" {API_KEY}\r\n") as client:
        assert client.runs() == []


@pytest.mark.parametrize("key", ["ts_ä", "ts_a b", "ts_a\nb", "ts_\x7f", "ts_\0"])
def test_a_key_that_no_header_can_carry(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        ServiceClient("127.0.0.1:1", api_key=key)
    if "\0" not in key:
        monkeypatch.setenv("TENSAFE_API_KEY", key)
        with pytest.raises(ConfigError, match="printable ASCII") as caught:
            ServiceClient("127.0.0.1:1")
        assert key not in str(caught.value)


def test_closing_ends_a_followed_stream(server: FakeCoordinator) -> None:
    client = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY)
    tc = client.create_training_client({"model_ref": "m"})
    tc.optim_step().result(timeout=20)
    begun, ended = threading.Event(), []

    def follow() -> None:
        try:
            for _ in tc.metrics(follow=True):
                begun.set()
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    assert begun.wait(timeout=20)
    client.close()
    thread.join(timeout=20)
    assert [type(error) for error in ended] == [ClientClosedError]


def test_closing_ends_a_followed_stream_of_asyncio(server: FakeCoordinator) -> None:
    async def main() -> None:
        client = AsyncServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY)
        tc = await client.create_training_client({"model_ref": "m"})
        await tc.optim_step()
        begun = asyncio.Event()

        async def follow() -> None:
            async for _ in tc.metrics(follow=True):
                begun.set()

        task = asyncio.create_task(follow())
        await asyncio.wait_for(begun.wait(), timeout=20)
        await client.close()
        with pytest.raises(ClientClosedError):
            await asyncio.wait_for(task, timeout=20)

    asyncio.run(main())


BAD_ARGUMENTS: dict[str, Callable[[ServiceClient, TrainingClient], Any]] = {
    "model_ref": lambda client, _: client.create_training_client({"model_ref": LONE}),
    "name": lambda client, _: client.create_training_client({"model_ref": "m", "name": LONE}),
    "prompts[0]": lambda _, tc: tc.sample_async(LONE),
    "prompts[1]": lambda _, tc: tc.sample_async(["a", LONE]),
    "content": lambda _, tc: tc.sample_async([{"role": "user", "content": LONE}]),
    "stop": lambda _, tc: tc.sample_async("a", stop=[LONE]),
    "model": lambda client, _: client.sample_async("a", model=LONE),
    "metadata.a": lambda _, tc: tc.save_state_async({"a": LONE}),
    "key of metadata": lambda _, tc: tc.save_state_async({LONE: 1}),
    "loss_fn": lambda _, tc: tc.forward({"input_ids": [[1, 2]], "labels": [[1, 2]]}, LONE),
    "include_optimizer": lambda _, tc: tc.save_state_async(include_optimizer="no"),  # type: ignore[arg-type]
    "learning_rate": lambda _, tc: tc.optim_step(learning_rate=10**400),
    "since": lambda _, tc: tc.metrics(since=-1),
    "follow": lambda _, tc: tc.metrics(follow="yes"),  # type: ignore[arg-type]
    "run_id": lambda client, _: client.run(5),  # type: ignore[arg-type]
    "of run_id": lambda client, _: client.operations(5),  # type: ignore[arg-type]
    "operation_id": lambda client, _: client.future(5),  # type: ignore[arg-type]
    "artifact_id": lambda client, _: client.artifact(None),  # type: ignore[arg-type]
    "tokenizer's model_ref": lambda client, _: client.tokenizer_files(LONE),
    "limit": lambda client, _: client.runs(limit="2"),  # type: ignore[arg-type]
    "tenant's name": lambda client, _: client.admin.create_tenant(LONE),
    "kind": lambda client, _: client.admin.create_key(kind=["tenant"]),  # type: ignore[arg-type]
    "key_id": lambda client, _: client.admin.revoke_key(5),  # type: ignore[arg-type]
    "step": lambda _, tc: tc.sample_async("a", step=2**63),
    "the step": lambda _, tc: tc.sample_async("a", step=2**53),
}


@pytest.mark.parametrize("named", BAD_ARGUMENTS)
def test_bad_arguments_get_typed_errors(
    named: str, client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        BAD_ARGUMENTS[named](client, tc)
    assert named.rsplit(" ", maxsplit=1)[-1] in str(caught.value)
    str(caught.value).encode()  # what is shown can be printed
    assert not server.stored
    assert tc.optim_step().seq == 1


def test_the_largest_step_is_sent(tc: TrainingClient) -> None:
    assert tc.sample("a", step=2**53 - 1).samples
