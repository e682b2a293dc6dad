"""What a stream of a sample's tokens is to its reader: each token once, and leaving cancels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from fake_server import API_KEY, FakeCoordinator
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe.v1 import operations_pb2 as ops
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import decode, encode
from tensafe_client import (
    AsyncServiceClient,
    OperationCancelledError,
    SampleChunk,
    SampleDivergedError,
    SampleStream,
    ServerError,
    ServiceClient,
    TenSafeError,
    TrainingClient,
    WindowPoisonedError,
)
from tensafe_client.token_streams import Received

TEXT = "a horse, a horse, my kingdom"


def chunk(position: int, tokens: list[int], text: str = "", sample: int = 0) -> ops.TokenChunk:
    numbers = encode(-np.asarray(tokens, np.float32))
    return ops.TokenChunk(
        sample_index=sample,
        position=position,
        tokens=encode(np.asarray(tokens, np.int32)),
        logprobs=numbers,
        raw_logprobs=numbers,
        text=text,
    )


def pieces(tokens: list[int], cuts: list[int]) -> list[ops.TokenChunk]:
    """A completion of these tokens, each with a letter of text that comes one token late."""
    text = "".join(chr(97 + token) for token in tokens)
    edges = sorted({0, *[cut % (len(tokens) + 1) for cut in cuts], len(tokens)})
    parts = [chunk(a, tokens[a:b], text[max(0, a - 1) : b - 1]) for a, b in pairwise(edges)]
    return [*parts, chunk(len(tokens), [], text[max(0, len(tokens) - 1) :])]


def joined(chunks: list[SampleChunk]) -> tuple[list[int], str]:
    return [int(t) for one in chunks for t in one.tokens], "".join(one.text for one in chunks)


LETTERS = st.lists(st.integers(0, 25), min_size=1, max_size=12)


@settings(deadline=None)
@given(LETTERS, st.lists(st.tuples(st.lists(st.integers(0, 12)), st.integers(0, 12)), max_size=4))
def test_each_token_and_letter_comes_once_however_streams_break(tokens, attempts):
    received = Received("op-1")
    seen: list[SampleChunk] = []
    for cuts, broken_after in attempts:
        for part in pieces(tokens, cuts)[:broken_after]:
            seen += filter(None, [received.take(part)])
    for part in pieces(tokens, []):
        seen += filter(None, [received.take(part)])
    assert joined(seen) == (tokens, "".join(chr(97 + token) for token in tokens))
    ends = [one.position + len(one.tokens) for one in seen]
    assert [one.position for one in seen] == [0, *ends[:-1]]
    logprobs = np.concatenate([one.logprobs for one in seen])
    assert (-logprobs).tolist() == tokens


def completion(tokens: list[int], text: str, sample: int = 0) -> ops.Completion:
    ids = encode(np.asarray(tokens, np.int32))
    return ops.Completion(sample_index=sample, tokens=ids, completion=text)


def whole(tokens: list[int]) -> ops.SampleResult:
    text = "".join(chr(97 + token) for token in tokens)
    return ops.SampleResult(completions=[completion(tokens, text)])


@settings(deadline=None)
@given(LETTERS, LETTERS, st.integers(1, 12))
def test_another_completion_is_told_apart_at_its_first_difference(before, after, known):
    received = Received("op-1")
    for part in pieces(before, list(range(13)))[:known]:
        received.take(part)
    had = before[:known]

    def execute_again() -> None:
        for part in pieces(after, []):
            received.take(part)
        received.check(whole(after))

    if after[: len(had)] == had:
        execute_again()
        return
    both = min(len(had), len(after))
    first = next((i for i in range(both) if had[i] != after[i]), both)
    with pytest.raises(SampleDivergedError, match=f"from token {first} on"):
        execute_again()


def test_a_hole_is_the_servers_fault():
    received = Received("op-1")
    received.take(chunk(0, [1]))
    with pytest.raises(ServerError, match="token 3"):
        received.take(chunk(3, [4]))


@pytest.fixture
def scripted(server: FakeCoordinator) -> Callable[..., None]:
    """Sets what streams bring, and lets the sample end only when it is told to, as the last of them
    says."""

    def script(*streams: list[ops.TokenChunk | TenSafeFault | None]) -> None:
        server.hold = True
        server.scripts = [list(one) for one in streams]
        received: dict[int, tuple[list[int], str]] = {}
        for one in filter(None, streams[-1]):
            tokens, text = received.get(one.sample_index, ([], ""))
            received[one.sample_index] = [*tokens, *decode(one.tokens)], text + one.text
        server.drawn = [completion(*each, key) for key, each in received.items()]

    return script


def test_a_stream_brings_chunks_and_ends_with_the_result(
    tc: TrainingClient, server: FakeCoordinator, scripted
):
    scripted([chunk(0, [1], "a"), chunk(0, [7], "x", sample=1), chunk(1, [2, 3], "bc")])
    stream = tc.sample("hi", stream=True)
    assert isinstance(stream, SampleStream)
    first = next(stream)
    assert (first.text, first.tokens.tolist(), first.position) == ("a", [1], 0)
    server.release()
    rest = list(stream)
    assert [(one.sample_index, one.text) for one in rest] == [(1, "x"), (0, "bc")]
    assert [one.raw_logprobs.tolist() for one in rest] == [[-7.0], [-2.0, -3.0]]
    assert stream.result(10).samples[0].completion == "abc"
    assert next(stream, None) is None
    assert not stream.future.cancelled()


def test_a_stream_goes_on_after_breaks_and_repeats_nothing(
    tc: TrainingClient, server: FakeCoordinator, scripted
):
    scripted(
        [chunk(0, [1, 2], "ab"), None],
        [None],
        [chunk(0, [1], "a"), None],
        [chunk(0, [1, 2, 3], "abc"), chunk(3, [4], "d")],
    )
    stream = tc.sample("hi", stream=True)
    seen = [next(stream) for _ in range(3)]
    server.release()
    seen += list(stream)
    assert joined(seen) == ([1, 2, 3, 4], "abcd")
    assert server.streams == 4


def test_a_stream_that_is_one_too_many_comes_later(
    tc: TrainingClient, server: FakeCoordinator, scripted
):
    full = TenSafeFault("QUEUE_FULL", "too many streams", retry_delay_s=0.01)
    scripted([full], [full], [chunk(0, [1, 2], "ab")])
    stream = tc.sample("hi", stream=True)
    server.release()
    assert joined(list(stream)) == ([1, 2], "ab")
    assert server.streams == 3


def test_a_sample_that_came_out_otherwise_is_an_error_and_its_result_stays(
    tc: TrainingClient, server: FakeCoordinator, scripted
):
    scripted([chunk(0, [1, 2, 3]), None], [chunk(0, [1, 9])])
    stream = tc.sample("hi", stream=True)
    next(stream)
    with pytest.raises(SampleDivergedError, match="from token 1 on") as raised:
        next(stream)
    assert raised.value.resource == stream.future.operation_id
    assert next(stream, None) is None
    stream.close()
    server.release()
    assert stream.result(10).samples  # it was not cancelled


def left_by_break(stream: SampleStream) -> None:
    for _ in stream:
        break


def left_by_with(stream: SampleStream) -> None:
    with stream:
        next(stream)


def left_by_error(stream: SampleStream) -> None:
    with suppress(ZeroDivisionError):
        for _ in stream:
            _ = 1 // 0


def left_by_close(stream: SampleStream) -> None:
    stream.close()
    stream.close()


@pytest.mark.parametrize("leave", [left_by_break, left_by_with, left_by_error, left_by_close])
def test_leaving_early_cancels(tc: TrainingClient, server: FakeCoordinator, scripted, leave):
    scripted([chunk(0, [1], "a")])
    stream = tc.sample("hi", stream=True)
    leave(stream)
    assert stream.future.cancelled()
    assert server.stored["op-1"].operation.state == ops.OPERATION_STATE_CANCELLED
    assert next(stream, None) is None
    with pytest.raises(OperationCancelledError) as raised:
        stream.result(10)
    assert "before it ran" not in str(raised.value)


def test_the_end_of_a_loop_cancels_nothing(tc: TrainingClient, server: FakeCoordinator, scripted):
    scripted([chunk(0, [1], "a")])
    server.hold = False
    with tc.sample("hi", stream=True) as stream:
        assert len(list(stream)) == 1
    assert stream.result(10).samples


def test_a_stream_raises_what_its_sample_failed_with(
    tc: TrainingClient, server: FakeCoordinator, scripted
):
    server.fail[1] = TenSafeFault("WINDOW_POISONED", "for once", run_id="run-1")
    stream = tc.sample("hi", stream=True)
    with pytest.raises(WindowPoisonedError):
        list(stream)
    server.refuse[2] = TenSafeFault("WINDOW_POISONED", "at the door", run_id="run-1")
    stream = tc.sample("hi", stream=True)
    with pytest.raises(WindowPoisonedError, match="at the door"):
        next(stream)
    stream.close()


def test_a_cancel_by_somebody_else_ends_the_stream(
    client: ServiceClient, tc: TrainingClient, scripted
):
    scripted([chunk(0, [1], "a")])
    stream = tc.sample("hi", stream=True)
    next(stream)
    assert client.cancel(stream.future.operation_id or "")
    with pytest.raises(OperationCancelledError):
        next(stream)


def test_a_closed_client_says_so(server: FakeCoordinator, scripted):
    scripted([chunk(0, [1], "a")])
    client = ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY)
    stream = client.sample("hi", model="m", stream=True)
    next(stream)
    client.close()
    with pytest.raises(TenSafeError, match="closed"):
        next(stream)


def test_a_stream_waits_for_a_server_that_is_away(server: FakeCoordinator, scripted):
    scripted([chunk(0, [1], "a"), None], [chunk(0, [1, 2], "ab")])
    with ServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as client:
        stream = client.sample("hi", model="m", stream=True)
        assert next(stream).text == "a"
        server.stop()
        server.start()
        assert next(stream).text == "b"
        server.release()
        assert list(stream) == []


def test_the_asyncio_twin_does_the_same(server: FakeCoordinator, scripted):
    scripted([chunk(0, [1], "a"), chunk(1, [2], "b")])

    async def main() -> None:
        async with AsyncServiceClient(f"127.0.0.1:{server.port}", api_key=API_KEY) as client:
            stream = client.sample("hi", model="m", stream=True)
            texts = [(await anext(stream)).text]
            server.release()
            texts += [one.text async for one in stream]
            assert texts == ["a", "b"]
            assert (await stream.result()).samples
            scripted([chunk(0, [5], "e")], [chunk(0, [6], "f")])
            async with client.sample("hi", model="m", stream=True) as left:
                assert (await anext(left)).text == "e"
            assert left.future.cancelled()
            broken = client.sample("hi", model="m", stream=True)
            async for _ in broken:
                break
            with pytest.raises(OperationCancelledError):  # as soon as the loop comes to it
                await broken.result()
            stopped = client.sample("hi", model="m", stream=True)
            assert await stopped.cancel()

    asyncio.run(main())


def test_what_is_asked_for_is_sent(tc: TrainingClient, server: FakeCoordinator):
    tc.sample(
        "hi", max_tokens=3, top_logprobs=5, prompt_logprobs=True, num_samples=2, stop=["x", 7]
    )
    tc.sample("hi", stream=True).result(10)
    asked, streamed = (server.stored[name].spec.sample for name in ("op-1", "op-2"))
    assert (asked.params.max_tokens, asked.params.top_logprobs) == (3, 5)
    assert asked.params.prompt_logprobs
    assert not asked.stream
    assert streamed.stream
    assert not streamed.params.HasField("top_logprobs")


def test_results_have_short_representations(tc: TrainingClient):
    result = tc.sample(["hi"] * 5)
    assert repr(result.samples[0]) == "<Sample ' and so on' 2 tokens, length>"
    assert repr(result).startswith("<SampleResult of step 0: 5 in [<Sample ' and so on'")
    assert repr(result).endswith(", ...]>")
