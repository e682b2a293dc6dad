"""The service and training clients, sync and asyncio, against the fake coordinator."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_server import API_KEY, FILES, FakeCoordinator

from tensafe.wire.tensors import decode
from tensafe_client import (
    ArtifactNotFoundError,
    AsyncServiceClient,
    ChecksumMismatchError,
    ConfigError,
    InvalidArgumentError,
    RunNotFoundError,
    ServiceClient,
    TrainingClient,
)

Batch = dict[str, list[list[int]]]


def test_runs(client: ServiceClient) -> None:
    made = [client.create_training_client({"model_ref": "m"}).run_id for _ in range(5)]
    assert [run.id for run in client.runs()] == made[::-1]
    assert [run.id for run in client.runs(limit=3)] == made[::-1][:3]
    assert client.run(made[0]).status == "active"
    assert client.delete_run(made[0]).status == "deleted"
    with pytest.raises(RunNotFoundError, match="run-77") as caught:
        client.run("run-77")
    assert caught.value.resource == "run-77"


def test_attach_goes_on_with_the_servers_seq(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    tc.optim_step().result(timeout=10)
    with ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as other:
        attached = other.training_client(tc.run_id)
        assert attached.step == 1
        assert attached.optim_step().result(timeout=10).step == 2
    again = client.training_client(tc.run_id)
    assert again.optim_step().seq == 3


def test_two_handles_of_one_session_share_the_numbering(
    client: ServiceClient, tc: TrainingClient, server: FakeCoordinator
) -> None:
    server.gate.clear()
    first = tc.optim_step()
    twin = client.training_client(tc.run_id)
    second = twin.optim_step()
    assert (first.seq, second.seq) == (1, 2)
    server.gate.set()
    assert second.result(timeout=10).step == 2
    assert tc.step == twin.step == 2


def test_state_and_step(tc: TrainingClient) -> None:
    assert (tc.step, tc.status) == (0, "active")
    tc.optim_step().result(timeout=10)
    assert tc.step == 1
    saved = tc.save_state(metadata={"notes": "epoch 1", "epoch": 1, "rate": 0.5})
    assert saved.artifact_id == "art-1"
    assert saved.metadata == {"notes": "epoch 1", "epoch": 1, "rate": 0.5}
    assert isinstance(saved.metadata["epoch"], int)
    loaded = tc.load_state(saved.artifact_id)
    assert (loaded.step, loaded.loaded_artifact_id, tc.step) == (7, "art-1", 7)
    assert tc.refresh().step == 1
    with tc as same:
        assert same is tc
    assert tc.refresh().status == "active"
    assert tc.delete().status == tc.status == "deleted"
    assert tc.run_id in repr(tc)


def test_metadata_must_be_json(tc: TrainingClient) -> None:
    for bad in ({"a": object()}, {"a": float("nan")}, {1: 2}, {"a": 2**60}, ["a"]):
        with pytest.raises(InvalidArgumentError):
            tc.save_state(metadata=bad)  # type: ignore[arg-type]
    assert tc.optim_step().seq == 1


def test_prompts_of_every_form(tc: TrainingClient, server: FakeCoordinator) -> None:
    chat = [{"role": "user", "content": "q"}]
    tc.sample(prompts=["Once upon a time"], max_tokens=100, temperature=0.7)
    for prompts in ("text", ["a", "b"], [1, 2], [[1, 2], np.array([3])], chat, [chat, "text"]):
        tc.sample(prompts)
    sent = [stored.spec.sample for stored in server.stored.values()]
    forms = [[prompt.WhichOneof("content") for prompt in sample.prompts] for sample in sent]
    assert forms == [
        ["text"],
        ["text"],
        ["text", "text"],
        ["tokens"],
        ["tokens", "tokens"],
        ["chat"],
        ["chat", "text"],
    ]
    assert decode(sent[4].prompts[1].tokens).tolist() == [3]
    assert sent[0].params.temperature == 0.7
    for bad in ([], [{"role": "user"}], [[1.5]], [None], 3, [[-1]]):
        with pytest.raises(InvalidArgumentError):
            tc.sample(bad)
    with pytest.raises(ConfigError, match="max_tokens"):
        tc.sample("x", max_tokens="3")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="not both"):
        tc.sample("x", step=1, artifact="art-1")
    with pytest.raises(InvalidArgumentError, match="reduction"):
        tc.forward_backward({"input_ids": [[1, 2]], "labels": [[1, 2]]}, reduction="mean")


def test_sample_result(tc: TrainingClient) -> None:
    sample = tc.sample("hi").samples[0]
    assert (sample.completion, sample.finish_reason) == (" and so on", "length")
    assert (sample.tokens.tolist(), sample.logprobs.tolist()) == ([1, 2], [-1.0, -2.0])
    assert sample.tokens_generated == 2


def test_metrics_are_pushed_and_resumed(tc: TrainingClient, server: FakeCoordinator) -> None:
    for _ in range(3):
        tc.optim_step().result(timeout=10)
    steps = list(tc.metrics())
    assert [step.step for step in steps] == [1, 2, 3]
    assert steps[0].loss == 2.49
    assert [step.step for step in tc.metrics(since=steps[1].cursor)] == [3]
    seen: list[int] = []
    reached = threading.Event()

    def follow() -> None:
        for step in tc.metrics(follow=True, since=steps[-1].cursor):
            seen.append(step.step)
            if step.step == 6:
                break
        reached.set()

    thread = threading.Thread(target=follow)
    thread.start()
    for _ in range(3):
        server.cut_watches()
        tc.optim_step().result(timeout=20)
    assert reached.wait(timeout=20)
    thread.join()
    assert seen == [4, 5, 6]


def test_download_is_checked_and_resumed(
    client: ServiceClient, server: FakeCoordinator, tmp_path: Path
) -> None:
    server.cut_download_after = 2**20
    folder = client.download_artifact("art-1", tmp_path / "a" / "b")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert server.downloads[-2:] == [
        ("adapter_model.safetensors", 0),
        ("adapter_model.safetensors", 2**20),
    ]
    server.downloads.clear()
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json.part").write_bytes(FILES["adapter_config.json"][:4])
    client.download_artifact("art-1", folder)
    assert server.downloads == [("adapter_config.json", 4)]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    with pytest.raises(ArtifactNotFoundError):
        client.download_artifact("art-2", tmp_path)


def test_a_damaged_download_is_refused(client: ServiceClient, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json.part").write_bytes(b"xxxx")
    with pytest.raises(ChecksumMismatchError, match="adapter_config"):
        client.download_artifact("art-1", tmp_path)
    assert not list(tmp_path.glob("adapter_config*"))
    client.download_artifact("art-1", tmp_path)


def test_tokenizer_files(client: ServiceClient) -> None:
    assert client.tokenizer_files("m") == {"tokenizer.json": b'{"a tokenizer": true}'}


def test_asyncio_twin(server: FakeCoordinator, batch: Batch, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as client:
            tc = await client.create_training_client({"model_ref": "m"})
            loss, step = tc.forward_backward(batch), tc.optim_step()
            assert (await loss).loss == 2.49
            assert (await step).step == 1
            assert (await tc.sample("hi")).samples[0].completion == " and so on"
            saved = await tc.save_state(metadata={"a": 1})
            assert (await tc.load_state(saved.artifact_id)).step == 7
            assert [item.step async for item in tc.metrics()] == [1]
            async for item in tc.metrics(follow=True):
                assert item.step == 1
                break
            assert [run.id for run in await client.runs()] == [tc.run_id]
            twin = await client.training_client(tc.run_id)
            assert (await twin.optim_step()).step == 2
            assert (await client.future("op-1")).done()
            assert await client.cancel("op-1") is False
            await client.download_artifact("art-1", tmp_path)
            assert (await tc.delete()).status == "deleted"
            with pytest.raises(RunNotFoundError):
                await client.run("run-9")

    asyncio.run(main())
    assert (tmp_path / "adapter_config.json").exists()


def test_an_asyncio_call_that_is_cancelled_ends(server: FakeCoordinator) -> None:
    async def main() -> None:
        async with AsyncServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as client:
            tc = await client.create_training_client({"model_ref": "m"})

            async def forever() -> None:
                async for _ in tc.metrics(follow=True):
                    pass

            task = asyncio.create_task(forever())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await tc.optim_step()).step == 1

    asyncio.run(main())
