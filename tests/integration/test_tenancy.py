"""Every RPC by every kind of caller, generated from the descriptors: a new RPC fails until it is
classified here."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from harness.rpcs import METHODS
from local_service import LocalService

from tensafe.v1 import (
    admin_pb2,
    artifacts_pb2,
    artifacts_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
)
from tensafe.wire.status import from_status
from tensafe_client import Datum, RunDeletedError, ServiceClient

# Methods of tenants that name something: what a foreign caller and a wrong name must get.
NAMED = {
    "TrainingService/GetRun": "RUN_NOT_FOUND",
    "TrainingService/DeleteRun": "RUN_NOT_FOUND",
    "TrainingService/AttachRun": "RUN_NOT_FOUND",
    "TrainingService/VerifyRun": "RUN_NOT_FOUND",
    "TrainingService/Submit": "RUN_NOT_FOUND",
    "OperationsService/GetOperation": "OPERATION_NOT_FOUND",
    "OperationsService/WaitOperation": "OPERATION_NOT_FOUND",
    "OperationsService/CancelOperation": "OPERATION_NOT_FOUND",
    "OperationsService/ListOperations": "RUN_NOT_FOUND",
    "OperationsService/Watch": "RUN_NOT_FOUND",
    "OperationsService/StreamSample": "OPERATION_NOT_FOUND",
    "MetricsService/StreamMetrics": "RUN_NOT_FOUND",
    "ArtifactsService/GetArtifact": "ARTIFACT_NOT_FOUND",
    "ArtifactsService/DownloadArtifact": "ARTIFACT_NOT_FOUND",
    "ArtifactsService/ListArtifacts": "RUN_NOT_FOUND",
    "ArtifactsService/DeleteArtifact": "ARTIFACT_NOT_FOUND",
    "ArtifactsService/UploadFile": "UPLOAD_NOT_FOUND",
    "ArtifactsService/FinishUpload": "UPLOAD_NOT_FOUND",
    "DatasetsService/GetDataset": "DATASET_NOT_FOUND",
    "DatasetsService/DeleteDataset": "DATASET_NOT_FOUND",
    "DatasetsService/UploadDatasetFile": "UPLOAD_NOT_FOUND",
    "DatasetsService/FinishDatasetUpload": "UPLOAD_NOT_FOUND",
    "PrivacyService/GetPrivacyReport": "RUN_NOT_FOUND",
}
# Methods of operators that name something: what a wrong name must get, whoever's it might be.
OPERATORS_NAMED = {
    "AdminService/CreateKey": "TENANT_NOT_FOUND",
    "AdminService/ListKeys": "TENANT_NOT_FOUND",
    "AdminService/RevokeKey": "KEY_NOT_FOUND",
    "AdminService/ListRuns": "TENANT_NOT_FOUND",
    "AdminService/VerifyRun": "RUN_NOT_FOUND",
}
OPERATORS_UNNAMED = {
    "AdminService/CreateTenant",
    "AdminService/ListTenants",
    "AdminService/GetStorage",
}
# Methods of tenants that name nothing of a tenant's; another test each shows their scope.
UNNAMED = {
    "TrainingService/CreateRun",
    "TrainingService/ListRuns",
    "TrainingService/SubmitBatch",
    "TrainingService/SubmitStream",
    "ArtifactsService/BeginUpload",
    "ModelsService/ListModels",
    "ModelsService/GetModel",
    "ModelsService/GetTokenizer",
    "ModelsService/ListLosses",
    "DatasetsService/BeginDatasetUpload",
    "DatasetsService/ListDatasets",
}


def short(name: str) -> str:
    return name.removeprefix("tensafe.v1.")


def call(service: LocalService, name: str, request: Any, key: str | None) -> tuple[str, str]:
    """(gRPC code, reason) of a call; ("OK", "") if it went through."""
    method = METHODS[name]
    metadata = [("authorization", f"Bearer {key}")] if key is not None else []
    with grpc.insecure_channel(service.target.removeprefix("grpc://")) as channel:
        kind = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        stub = kind(
            f"/{name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=method.output_type._concrete_class.FromString,
        )
        argument = iter([request]) if method.client_streaming else request
        try:
            answer = stub(argument, metadata=metadata, timeout=30)
            if method.server_streaming:
                next(answer, None)
                answer.cancel()
        except grpc.RpcError as error:
            return reason_of(name, error)
    return "OK", ""


def reason_of(name: str, error: grpc.RpcError) -> tuple[str, str]:
    """(gRPC code, reason) of a failed call; a failure without them is a defect."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{name}: {error}"
    detail = from_status(status)
    assert detail.reason, f"{name} sent no ErrorInfo"
    return detail.code, detail.reason


def request_for(name: str, ids: Mapping[str, str]) -> Any:
    """A valid request of a method that names things, with these ids."""
    method = METHODS[name]
    request = method.input_type._concrete_class()
    if short(name) == "TrainingService/Submit":
        request.operation.run_id = ids["run_id"]
        request.operation.seq = 9
        request.operation.optim_step.SetInParent()
    if short(name) == "ArtifactsService/UploadFile":
        request.start.upload_id, request.start.name = ids["upload_id"], "adapter_config.json"
    if short(name) == "DatasetsService/UploadDatasetFile":
        start = request.part.start
        start.upload_id, start.name = ids["dataset_upload_id"], "rows.jsonl"
    if short(name) == "DatasetsService/FinishDatasetUpload":
        request.upload_id = ids["dataset_upload_id"]
        request.request_id = uuid.uuid4().hex
        return request
    if short(name) == "AdminService/CreateKey":
        request.kind = admin_pb2.KEY_KIND_TENANT
    for field in (
        "run_id",
        "operation_id",
        "artifact_id",
        "upload_id",
        "dataset_id",
        "tenant",
        "key_id",
    ):
        if field in method.input_type.fields_by_name:
            setattr(request, field, ids[field])
    if "request_id" in method.input_type.fields_by_name:
        request.request_id = uuid.uuid4().hex
    return request


@pytest.fixture(scope="module")
def owned(service: LocalService) -> Iterator[dict[str, str]]:
    """Ids of things of the first tenant."""
    with ServiceClient(service.target, api_key=service.api_key) as client:
        tc = client.create_training_client({"model_ref": "any"})
        future = tc.save_state_async()
        saved = future.result(30)
        yield {
            "run_id": tc.run_id,
            "operation_id": str(future.operation_id),
            "artifact_id": saved.artifact_id,
            "upload_id": begin_upload(service),
            "dataset_id": client.upload_dataset([Datum([1], [2])]).id,
            "dataset_upload_id": begin_dataset_upload(service),
        }


def begin_upload(service: LocalService) -> str:
    """An upload of the first tenant, of which nothing has arrived yet."""
    files = [
        artifacts_pb2.ArtifactFile(name=name, size_bytes=2, sha256="0" * 64)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    request = artifacts_pb2.BeginUploadRequest(
        request_id=uuid.uuid4().hex, model_ref="any", files=files
    )
    with grpc.insecure_channel(service.target.removeprefix("grpc://")) as channel:
        stub = artifacts_pb2_grpc.ArtifactsServiceStub(channel)
        metadata = [("authorization", f"Bearer {service.api_key}")]
        return stub.BeginUpload(request, metadata=metadata, timeout=30).upload_id


def begin_dataset_upload(service: LocalService) -> str:
    """A dataset's upload of the first tenant, of which nothing has arrived yet."""
    file = artifacts_pb2.ArtifactFile(name="rows.jsonl", size_bytes=2, sha256="0" * 64)
    request = datasets_pb2.BeginDatasetUploadRequest(request_id=uuid.uuid4().hex, file=file)
    with grpc.insecure_channel(service.target.removeprefix("grpc://")) as channel:
        stub = datasets_pb2_grpc.DatasetsServiceStub(channel)
        metadata = [("authorization", f"Bearer {service.api_key}")]
        return stub.BeginDatasetUpload(request, metadata=metadata, timeout=30).upload_id


@pytest.fixture(scope="module")
def keys(service: LocalService) -> Iterator[dict[str, str]]:
    """A key of each kind, and one that was revoked."""
    with ServiceClient(service.target, api_key=service.admin_key) as operator:
        operator.admin.create_tenant("stranger")
        revoked = operator.admin.create_key("stranger")
        operator.admin.revoke_key(revoked.key.id)
        yield {
            "tenant": service.api_key,
            "stranger": operator.admin.create_key("stranger").secret,
            "admin": service.admin_key,
            "worker": operator.admin.create_key(kind="worker").secret,
            "revoked": revoked.secret,
        }


def test_every_method_is_classified():
    tenant = {
        short(name) for name in METHODS if not name.startswith(("tensafe.v1.Admin", "tensafe.v1.W"))
    }
    assert tenant == set(NAMED) | UNNAMED
    operators = {short(name) for name in METHODS if name.startswith("tensafe.v1.Admin")}
    assert operators == set(OPERATORS_NAMED) | OPERATORS_UNNAMED


@pytest.mark.parametrize("name", sorted(METHODS))
def test_without_a_good_key_nothing_answers(service: LocalService, keys: dict[str, str], name: str):
    request = METHODS[name].input_type._concrete_class()
    for key in (None, "", "ts_wrong", keys["revoked"]):
        assert call(service, name, request, key) == ("UNAUTHENTICATED", "UNAUTHENTICATED")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_service_takes_its_own_kind_of_key(
    service: LocalService, keys: dict[str, str], name: str
):
    right = {"AdminService": "admin", "WorkerService": "worker"}.get(
        short(name).partition("/")[0], "tenant"
    )
    request = METHODS[name].input_type._concrete_class()
    for kind in {"tenant", "admin", "worker"} - {right}:
        expected = ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert call(service, name, request, keys[kind]) == expected


@pytest.mark.parametrize("name", sorted(name for name in METHODS if short(name) in NAMED))
def test_a_foreign_id_and_an_unknown_one_are_the_same(
    service: LocalService, keys: dict[str, str], owned: dict[str, str], name: str
):
    unknown = {field: f"{value[:-6]}ffffff" for field, value in owned.items()}
    expected = ("NOT_FOUND", NAMED[short(name)])
    assert call(service, name, request_for(name, owned), keys["stranger"]) == expected
    assert call(service, name, request_for(name, unknown), keys["tenant"]) == expected


@pytest.mark.parametrize("name", sorted(OPERATORS_NAMED))
def test_an_operator_is_told_of_a_wrong_name(
    service: LocalService, keys: dict[str, str], owned: dict[str, str], name: str
):
    unknown = {"run_id": f"{owned['run_id'][:-6]}ffffff", "tenant": "nobody", "key_id": "key-none"}
    request = request_for(f"tensafe.v1.{name}", defaultdict(str, unknown))
    answer = call(service, f"tensafe.v1.{name}", request, keys["admin"])
    assert answer == ("NOT_FOUND", OPERATORS_NAMED[name])


def test_an_operator_lists_and_verifies_the_runs_of_every_tenant(
    service: LocalService, keys: dict[str, str], owned: dict[str, str]
):
    with ServiceClient(service.target, api_key=keys["admin"]) as operator:
        operator.admin.create_tenant("looked-after")
        key = operator.admin.create_key("looked-after").secret
        tenant = ServiceClient(service.target, api_key=key)
        tc = tenant.create_training_client({"model_ref": "any", "name": "not for operators"})
        tc.forward_backward({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
        tc.optim_step().result(30)
        everybodys = operator.admin.runs()
        assert {owned["run_id"], tc.run_id} <= {run.id for run in everybodys}
        assert everybodys == sorted(everybodys, key=lambda run: run.created_at, reverse=True)
        assert "not for operators" not in repr(everybodys)
        assert operator.admin.runs(limit=1) == everybodys[:1]
        [theirs] = operator.admin.runs("looked-after")
        assert (theirs.id, theirs.step) == (tc.run_id, 1)
        for run in everybodys:
            report = operator.admin.verify_run(run.id)
            assert report.reproduces
        progress: list[tuple[int, int]] = []
        report = operator.admin.verify_run(
            tc.run_id, on_progress=lambda *seen: progress.append(seen)
        )
        assert (report.run_id, report.replayed, report.exact) == (tc.run_id, 2, 2)
        assert progress == [(1, 2), (2, 2)]
        tenant.delete_run(tc.run_id)
        assert operator.admin.runs("looked-after") == []
        [deleted] = operator.admin.runs("looked-after", include_deleted=True)
        assert deleted.status == "deleted"
        with pytest.raises(RunDeletedError):
            operator.admin.verify_run(tc.run_id)
        tenant.close()


def test_listings_and_events_show_only_ones_own(
    service: LocalService, keys: dict[str, str], owned: dict[str, str]
):
    with ServiceClient(service.target, api_key=keys["stranger"]) as stranger:
        assert stranger.runs() == []
        assert stranger.artifacts() == []
        assert stranger.operations() == []


def test_a_foreign_artifact_cannot_be_loaded_or_sampled(
    service: LocalService, keys: dict[str, str], owned: dict[str, str]
):
    with ServiceClient(service.target, api_key=keys["stranger"]) as stranger:
        tc = stranger.create_training_client({"model_ref": "any"})
        for failure in (
            tc.load_state_async(owned["artifact_id"]).exception(30),
            tc.sample_async(["x"], artifact=owned["artifact_id"]).exception(30),
        ):
            assert failure is not None
            assert failure.reason == "ARTIFACT_NOT_FOUND"  # type: ignore[attr-defined]


OF_TENANTS = [name for name in METHODS if "Admin" not in name and "Worker" not in name]


@pytest.mark.parametrize("name", OF_TENANTS)
def test_a_malformed_message_is_the_callers_fault(service: LocalService, name: str):
    method, garbage = METHODS[name], b"\xff\xff\xff"
    ways = ("unary", "stream")
    call = f"{ways[method.client_streaming]}_{ways[method.server_streaming]}"
    with grpc.insecure_channel(service.target.removeprefix("grpc://")) as channel:
        stub = getattr(channel, call)(f"/{name}")
        sent = iter([garbage]) if method.client_streaming else garbage
        read = list if method.server_streaming else lambda answer: answer
        with pytest.raises(grpc.RpcError) as raised:
            read(stub(sent, metadata=[("authorization", f"Bearer {service.api_key}")]))
    status = rpc_status.from_call(raised.value)
    assert status is not None
    assert from_status(status).reason == "INVALID_ARGUMENT"
