"""Sampling through the service, with a real model: what is asked for, from the weights that are
named, token by token, beside training and other tenants."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator

import grpc
import numpy as np
import pytest
from harness.processes import worker_pids
from harness.tiny_model import CHAT_TEMPLATE, CONTEXT_LENGTH, save_tiny_model
from local_service import LocalService, local_service

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import operations_pb2_grpc
from tensafe.wire.status import from_status
from tensafe_client import (
    AsyncServiceClient,
    Datum,
    InvalidArgumentError,
    OperationCancelledError,
    Sample,
    SampleChunk,
    ServiceClient,
    TrainingClient,
)

PROMPT = [5, 6, 7, 8]
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def torch_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model = save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
    with local_service(
        backend="torch",
        models=[f"tiny={model}"],
        options=["--dtype", "float32"],
        directory=tmp_path_factory.mktemp("sampling"),
    ) as running:
        yield running


@pytest.fixture
def client(torch_service: LocalService) -> Iterator[ServiceClient]:
    with ServiceClient(torch_service.target, api_key=torch_service.api_key) as client:
        yield client


@pytest.fixture
def tc(client: ServiceClient) -> TrainingClient:
    config = {"model_ref": "tiny", "seed": 3, "optimizer": {"learning_rate": 0.05}}
    return client.create_training_client(config)


def step(tc: TrainingClient) -> None:
    """Submits an update, and waits for nothing."""
    tokens = np.random.default_rng(tc.step).integers(3, 200, 20)
    tc.forward_backward([Datum(tokens=tokens[:-1], target_tokens=tokens[1:])])
    tc.optim_step()


def forward_logprobs(tc: TrainingClient, sample: Sample, prompt: list[int]) -> np.ndarray:
    """What `forward` gives for a sample's tokens."""
    tokens = [*prompt, *sample.tokens.tolist()]
    datum = Datum(tokens=tokens[:-1], target_tokens=tokens[1:])
    return tc.forward([datum]).result(60).logprobs[0][len(prompt) - 1 :]


def joined(chunks: Iterable[SampleChunk]) -> dict[tuple[int, int], tuple[list[int], str]]:
    """Tokens and text of each completion, of chunks that follow one another."""
    found: dict[tuple[int, int], tuple[list[int], str]] = defaultdict(lambda: ([], ""))
    for chunk in chunks:
        key = chunk.prompt_index, chunk.sample_index
        tokens, text = found[key]
        assert chunk.position == len(tokens)
        assert len(chunk.tokens) == len(chunk.logprobs) == len(chunk.raw_logprobs)
        found[key] = [*tokens, *chunk.tokens.tolist()], text + chunk.text
    return dict(found)


def test_a_stream_is_its_result_in_pieces(tc: TrainingClient):
    prompts = [PROMPT, [9, 10]]
    for _ in range(10):
        stream = tc.sample(prompts, max_tokens=30, num_samples=3, seed=1, stream=True)
        chunks = list(stream)
        result = stream.result()
        # All is drawn in a moment: on a busy machine before anybody has asked for the first token.
        if len(chunks) > len(result.samples):
            break
    assert len(chunks) > len(result.samples)
    assert [(one.prompt_index, one.sample_index) for one in result.samples] == [
        (prompt, sample) for prompt in range(2) for sample in range(3)
    ]
    for (key, (tokens, text)), sample in zip(
        sorted(joined(chunks).items()), result.samples, strict=True
    ):
        assert key == (sample.prompt_index, sample.sample_index)
        assert tokens == sample.tokens.tolist()
        assert text == sample.completion
    again = tc.sample(prompts, max_tokens=30, num_samples=3, seed=1)
    assert [one.tokens.tolist() for one in again.samples] == [
        one.tokens.tolist() for one in result.samples
    ]


def test_texts_chats_and_stop_texts_stream_as_they_end(client: ServiceClient):
    for prompt in ("hello", CHAT):
        with client.sample(prompt, model="tiny", max_tokens=20, seed=5, stream=True) as stream:
            [(tokens, text)] = joined(stream).values()
            [sample] = stream.result().samples
        assert (tokens, text) == (sample.tokens.tolist(), sample.completion)
        if prompt is CHAT:
            assert "<|im_start|>user" in CHAT_TEMPLATE.replace("{{ message['role'] }}", "user")
            assert sample.prompt.endswith("<|im_start|>assistant\n")
        middle = text[len(text) // 2 : len(text) // 2 + 2]
        options = {"model": "tiny", "max_tokens": 20, "seed": 5, "stop": [middle]}
        with client.sample(prompt, stream=True, **options) as stopped:
            [(tokens, text)] = joined(stopped).values()
            [sample] = stopped.result().samples
        assert sample.finish_reason == "stop"
        assert (tokens, text) == (sample.tokens.tolist(), sample.completion)
        assert middle not in text


def test_sampler_and_trainer_agree_through_the_service(tc: TrainingClient):
    for _ in range(2):
        step(tc)
    options = {"max_tokens": 20, "temperature": 0.7, "top_k": 50, "stop": []}
    [sample] = tc.sample([PROMPT], seed=4, top_logprobs=3, prompt_logprobs=True, **options).samples
    np.testing.assert_allclose(sample.raw_logprobs, forward_logprobs(tc, sample, PROMPT), atol=1e-4)
    assert sample.top_tokens is not None
    assert sample.top_logprobs is not None
    assert sample.prompt_logprobs is not None
    assert sample.top_tokens.shape == sample.top_logprobs.shape == (20, 3)
    assert (np.diff(sample.top_logprobs, axis=1) <= 0).all()
    assert (sample.raw_logprobs <= sample.top_logprobs[:, 0] + 1e-6).all()
    assert np.isnan(sample.prompt_logprobs[0])
    datum = Datum(tokens=PROMPT[:-1], target_tokens=PROMPT[1:])
    [before] = tc.forward([datum]).result(60).logprobs
    np.testing.assert_allclose(sample.prompt_logprobs[1:], before, atol=1e-4)
    plain = tc.sample([PROMPT], **options).samples[0]
    assert (plain.top_tokens, plain.top_logprobs, plain.prompt_logprobs) == (None, None, None)


def test_weights_are_those_that_are_named(client: ServiceClient, tc: TrainingClient):
    greedy = {"max_tokens": 12, "temperature": 0, "stop": []}
    step(tc)
    saved = tc.save_state_async()
    step(tc)
    stepped = tc.sample([PROMPT], **greedy)  # behind an update that nobody has awaited
    step(tc)
    assert stepped.model_step == 2
    artifact = saved.result(60).artifact_id
    version = tc.sample([PROMPT], step=1, **greedy)
    by_artifact = client.sample([PROMPT], artifact=artifact, **greedy)
    base = client.sample([PROMPT], model="tiny", **greedy)
    assert (version.model_step, by_artifact.model_step, base.model_step) == (1, 1, 0)
    assert version.samples[0].tokens.tolist() == by_artifact.samples[0].tokens.tolist()
    raws = [one.samples[0].raw_logprobs for one in (base, version, stepped)]
    assert len({tuple(np.round(raw, 4)) for raw in raws}) == 3
    fresh = client.create_training_client({"model_ref": "tiny", "seed": 3})
    np.testing.assert_allclose(raws[0], forward_logprobs(fresh, base.samples[0], PROMPT), atol=1e-4)


@pytest.fixture
def stranger(torch_service: LocalService) -> Iterator[ServiceClient]:
    with ServiceClient(torch_service.target, api_key=torch_service.admin_key) as operator:
        name = f"stranger-{uuid.uuid4().hex}"
        operator.admin.create_tenant(name)
        key = operator.admin.create_key(name).secret
    with ServiceClient(torch_service.target, api_key=key) as client:
        yield client


def test_samples_of_two_tenants_and_training_go_on_together(
    client: ServiceClient, tc: TrainingClient, stranger: ServiceClient
):
    """Whatever comes after a long sample ends before it, on the same worker."""
    long = tc.sample([PROMPT] * 24, max_tokens=110, num_samples=8, stop=[], stream=True)
    first = next(long)
    short = stranger.sample([PROMPT], model="tiny", max_tokens=5, stream=True)
    tokens = np.arange(3, 20)
    passed = tc.forward_backward([Datum(tokens=tokens[:-1], target_tokens=tokens[1:])])
    updated = tc.optim_step()  # of the sample's own run
    assert joined(short)
    assert passed.result(60)
    assert updated.result(60).step == 1
    assert sum(map(len, (tokens for tokens, _ in joined([first, *long]).values()))) == 24 * 8 * 110
    assert long.result(120).model_step == 0
    ends = [
        owner.operation(future.operation_id or "").finished_at
        for owner, future in (
            (stranger, short.future),
            (client, updated),
            (client, long.future),
        )
    ]
    assert None not in ends
    assert max(ends[:2]) < ends[2]  # type: ignore[type-var]


def test_leaving_early_frees_the_worker_at_once(client: ServiceClient, tc: TrainingClient):
    for _ in tc.sample([PROMPT] * 8, max_tokens=110, num_samples=8, stop=[], stream=True):
        break
    [operation] = client.operations(tc.run_id, limit=1)
    assert operation.state == "cancelled"
    with pytest.raises(OperationCancelledError):
        client.future(operation.id).result(10)
    assert tc.sample([PROMPT], max_tokens=3).samples


def test_the_asyncio_twin_streams(torch_service: LocalService):
    async def main() -> None:
        target, key = torch_service.target, torch_service.api_key
        async with AsyncServiceClient(target, api_key=key) as client:
            streams = [
                client.sample([PROMPT], model="tiny", max_tokens=20, seed=seed, stream=True)
                for seed in range(3)
            ]

            async def read(stream) -> list[int]:
                return [int(t) async for chunk in stream for t in chunk.tokens]

            found = await asyncio.gather(*(read(stream) for stream in streams))
            for tokens, stream in zip(found, streams, strict=True):
                assert tokens == (await stream.result()).samples[0].tokens.tolist()

    asyncio.run(main())


def test_the_same_seed_draws_the_same_after_its_worker_was_killed(
    torch_service: LocalService, client: ServiceClient
):
    tc = client.create_training_client({"model_ref": "tiny", "seed": 6})
    options = {"max_tokens": 100, "num_samples": 4, "seed": 11, "stop": []}
    expected = tc.sample([PROMPT] * 4, **options)
    stream = tc.sample([PROMPT] * 4, stream=True, **options)
    chunks = [next(stream) for _ in range(20)]
    [pid] = worker_pids(torch_service)
    os.kill(pid, signal.SIGKILL)
    chunks += stream
    found = [tokens for _, (tokens, _) in sorted(joined(chunks).items())]
    assert found == [one.tokens.tolist() for one in expected.samples]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 1024, "max_tokens": 100, "top_logprobs": 20}, "sample"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(client: ServiceClient, options, field: str):
    prompts = [PROMPT] * 16
    with pytest.raises(InvalidArgumentError, match=field) as raised:
        client.sample(prompts, model="tiny", **options)
    assert any(field in name for name, _ in raised.value.violations)


def test_a_long_prompt_leaves_what_the_context_has(client: ServiceClient):
    prompt = [5] * (CONTEXT_LENGTH - 3)
    stream = client.sample([prompt], model="tiny", max_tokens=50, stop=[], stream=True)
    [(tokens, _)] = joined(stream).values()
    assert len(tokens) == 3
    assert stream.result().samples[0].finish_reason == "length"


def test_only_samples_are_streamed_and_only_to_their_tenant(
    torch_service: LocalService, client: ServiceClient, tc: TrainingClient, stranger: ServiceClient
):
    saving = tc.save_state_async()
    saving.result(60)
    sampled = tc.sample_async([PROMPT], max_tokens=3)
    sampled.result(60)

    def stream(owner: ServiceClient, operation_id: str | None) -> list[ops.StreamSampleResponse]:
        with grpc.insecure_channel(torch_service.target.removeprefix("grpc://")) as channel:
            stub = operations_pb2_grpc.OperationsServiceStub(channel)
            request = ops.StreamSampleRequest(operation_id=operation_id or "")
            return list(stub.StreamSample(request, metadata=list(owner._session.metadata)))

    [*chunks, last] = stream(client, sampled.operation_id)
    assert [len(one.chunks) for one in chunks] == [1]
    assert last.operation.id == sampled.operation_id
    for owner, operation_id, reason in (
        (stranger, sampled.operation_id, "OPERATION_NOT_FOUND"),
        (client, saving.operation_id, "INVALID_ARGUMENT"),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            stream(owner, operation_id)
        from grpc_status import rpc_status

        status = rpc_status.from_call(raised.value)
        assert status is not None
        assert from_status(status).reason == reason
