"""What every gRPC tool expects of a server: health, reflection, rich errors, limits."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status
from harness.wire import batch, forward_backward, int32, int64, raw_client
from local_service import LocalService, tensafe_command

from tensafe.v1 import training_pb2 as pb
from tensafe.v1 import training_pb2_grpc
from tensafe.wire.channel import MAX_MESSAGE_BYTES
from tensafe.wire.status import from_status

SERVICES = {
    f"tensafe.v1.{name}Service"
    for name in (
        *("Admin", "Artifacts", "Datasets", "Metrics", "Models"),
        *("Operations", "Privacy", "Training", "Worker"),
    )
}


@pytest.fixture(scope="module")
def channel(service: LocalService) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(
        service.target.removeprefix("grpc://"),
        options=[("grpc.max_send_message_length", -1)],
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def key(service: LocalService) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {service.api_key}")]


@pytest.mark.parametrize("name", ["", *sorted(SERVICES)])
def test_every_service_is_healthy(channel: grpc.Channel, name: str):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_every_service(channel: grpc.Channel):
    assert set(ProtoReflectionDescriptorDatabase(channel).get_services()) >= SERVICES


def test_a_broken_rule_comes_as_bad_request(channel: grpc.Channel, key: list[tuple[str, str]]):
    config = pb.RunConfig(model_ref="any", lora=pb.LoraConfig(rank=0, dropout=float("nan")))
    with pytest.raises(grpc.RpcError) as raised:
        training_pb2_grpc.TrainingServiceStub(channel).CreateRun(
            pb.CreateRunRequest(request_id="request-1", config=config), metadata=key
        )
    status = rpc_status.from_call(raised.value)
    assert status is not None
    found = error_details_pb2.BadRequest()
    [packed] = [detail for detail in status.details if detail.Is(found.DESCRIPTOR)]
    packed.Unpack(found)
    fields = {violation.field for violation in found.field_violations}
    assert {"config.lora.rank", "config.lora.dropout"} <= fields


def test_a_long_list_of_violations_fits_into_the_trailers(
    channel: grpc.Channel, key: list[tuple[str, str]]
):
    lora = pb.LoraConfig(target_modules=["x" * 200 + str(n) for n in range(64)])
    with pytest.raises(grpc.RpcError) as raised:
        training_pb2_grpc.TrainingServiceStub(channel).CreateRun(
            pb.CreateRunRequest(
                request_id="request-2", config=pb.RunConfig(model_ref="any", lora=lora)
            ),
            metadata=key,
        )
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_message_beyond_the_limit_is_refused_by_name(service: LocalService):
    with raw_client(service.target, service.api_key) as raw:
        run = raw.stub.CreateRun(
            pb.CreateRunRequest(request_id="request-3", config=pb.RunConfig(model_ref="any")),
            metadata=raw.metadata,
        ).run
        size = MAX_MESSAGE_BYTES // 8 + 1024
        tokens = int32([1] * size)
        content = batch(int64([0, size]), tokens, target_tokens=tokens)
        error = raw.submit(forward_backward(run.id, 1, content))
        assert error is not None
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "MESSAGE_TOO_LARGE")
        assert raw.next_seq(run.id) == 2


def test_an_unknown_method_says_so(channel: grpc.Channel, key: list[tuple[str, str]]):
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/tensafe.v1.TrainingService/Nothing")(b"", metadata=key)
    status = rpc_status.from_call(raised.value)
    assert status is not None
    detail = from_status(status)
    assert (detail.code, detail.reason) == ("UNIMPLEMENTED", "UNIMPLEMENTED")


def test_one_data_directory_has_one_coordinator(service: LocalService):
    second = subprocess.run(
        tensafe_command(
            *("up", "--backend", "mock", "--listen", "127.0.0.1:0"),
            *("--data", str(service.directory / "data"), "--no-profile"),
        ),
        env=service.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert "another coordinator is using" in second.stderr
    assert "Traceback" not in second.stderr
