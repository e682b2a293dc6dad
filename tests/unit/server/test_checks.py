"""What is refused before it is queued, and how."""

from __future__ import annotations

import numpy as np
import pytest

from tensafe.v1 import losses_pb2
from tensafe.v1 import training_pb2 as pb
from tensafe.v1 import types_pb2 as types
from tensafe.v1.artifacts_pb2 import BeginUploadRequest
from tensafe.v1.models_pb2 import Model
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import encode
from tensafe_server.events.translate import expires_at
from tensafe_server.operations import checks
from tensafe_server.operations.checks import check_identity
from tensafe_server.operations.validation import check_rules
from workers.losses import LossRegistry

LOSSES = {card.name: card for card in LossRegistry().cards()}
MODEL = Model(name="tiny", vocabulary_size=100, context_length=16)


def check_content(spec: pb.OperationSpec, model: Model) -> float:
    return checks.check_content(spec, model, LOSSES)


def forward_backward(
    tokens: list[int],
    offsets: list[int],
    targets: list[int] | None = None,
    weights: list[float] | None = None,
    reduction: int = 0,
) -> pb.OperationSpec:
    inputs = [
        types.NamedTensor(
            name="target_tokens", tensor=encode(np.asarray(targets or tokens, np.int32))
        )
    ]
    if weights is not None:
        inputs.append(
            types.NamedTensor(name="weights", tensor=encode(np.asarray(weights, np.float32)))
        )
    batch = pb.Batch(
        offsets=encode(np.asarray(offsets, np.int64)),
        input_tokens=encode(np.asarray(tokens, np.int32)),
        loss_inputs=inputs,
    )
    return pb.OperationSpec(
        run_id="run-1",
        seq=1,
        forward_backward=pb.ForwardBackward(
            batch=pb.Payload(inline=batch),
            loss=losses_pb2.LossConfig(reduction=reduction),  # type: ignore[arg-type]
        ),
    )


@pytest.mark.parametrize(("field", "most"), [("artifact_id", 64), ("base_model", 256)])
def test_names_of_weights_are_short(field: str, most: int):
    def sampling(size: int) -> pb.OperationSpec:
        weights = pb.SampleWeights(**{field: "x" * size})
        prompts = [pb.Prompt(text="x")]
        return pb.OperationSpec(sample=pb.Sample(prompts=prompts, weights=weights))

    check_rules(sampling(most))
    with pytest.raises(TenSafeFault, match=rf"sample\.weights\.{field}: must be at most {most}"):
        check_rules(sampling(most + 1))


HUGE = types.Tensor(dtype=types.DATA_TYPE_INT64, shape=[2**62, 0])
HUGE_HALVES = types.Tensor(dtype=types.DATA_TYPE_BFLOAT16, shape=[2, 2**62, 0])


@pytest.mark.parametrize("tensor", [HUGE, HUGE_HALVES], ids=["int64", "bfloat16"])
@pytest.mark.parametrize("field", ["offsets", "input_tokens", "target_tokens", "prompt"])
def test_a_shape_beyond_all_memory_is_refused_also_if_it_is_empty(field: str, tensor: types.Tensor):
    spec = forward_backward([1, 2], [0, 2])
    batch = spec.forward_backward.batch.inline
    if field == "prompt":
        spec = pb.OperationSpec(sample=pb.Sample(prompts=[pb.Prompt(tokens=tensor)]))
    elif field == "target_tokens":
        batch.loss_inputs[0].tensor.CopyFrom(tensor)
    else:
        getattr(batch, field).CopyFrom(tensor)
    with pytest.raises(TenSafeFault, match="shape") as caught:
        check_content(spec, MODEL)
    assert caught.value.detail.reason == "INVALID_BATCH"


def test_a_good_batch_costs_its_tokens_three_times():
    assert check_content(forward_backward([1, 2, 3], [0, 1, 3]), MODEL) == 9.0


@pytest.mark.parametrize(
    ("spec", "reason", "field"),
    [
        (forward_backward([1, 100], [0, 2]), "TOKEN_OUT_OF_RANGE", "input_tokens"),
        (forward_backward([1, -1], [0, 2]), "TOKEN_OUT_OF_RANGE", "input_tokens"),
        (forward_backward([1, 2], [0, 2], [1, 100]), "TOKEN_OUT_OF_RANGE", "target_tokens"),
        (forward_backward([1] * 17, [0, 17]), "CONTEXT_EXCEEDED", "offsets"),
        (forward_backward([1, 2], [0, 3]), "INVALID_BATCH", "input_tokens"),
        (forward_backward([1, 2], [0, 0, 2]), "INVALID_BATCH", "offsets"),
        (forward_backward([1, 2], [0]), "INVALID_BATCH", "offsets"),
        (forward_backward([1, 2], [1, 2]), "INVALID_BATCH", "offsets"),
        (forward_backward([1, 2], [0, 2], [1]), "INVALID_BATCH", "target_tokens"),
        (forward_backward([1, 2], [0, 2], weights=[0, 0]), "NOTHING_SCORED", "weights"),
        (forward_backward([1, 2], [0, 2], weights=[1, -1]), "INVALID_BATCH", "weights"),
        (forward_backward([1, 2], [0, 2], weights=[1, np.nan]), "INVALID_BATCH", "weights"),
    ],
)
def test_a_bad_batch_is_refused_by_field(spec: pb.OperationSpec, reason: str, field: str):
    with pytest.raises(TenSafeFault) as raised:
        check_content(spec, MODEL)
    assert raised.value.detail.reason == reason
    assert raised.value.detail.metadata["field"].endswith(field)


def test_of_a_private_run_a_batch_may_score_nothing():
    spec = forward_backward([1, 2], [0, 2], weights=[0, 0])
    assert checks.check_content(spec, MODEL, LOSSES, private=True) == 6.0
    bad = forward_backward([1, 2], [0, 2], weights=[0, -1])
    with pytest.raises(TenSafeFault, match="negative"):
        checks.check_content(bad, MODEL, LOSSES, private=True)


def test_a_token_out_of_range_is_named_by_its_datum():
    with pytest.raises(TenSafeFault, match="position 1 of datum 2") as raised:
        check_content(forward_backward([1, 2, 3, 4, 100, 6], [0, 1, 3, 6]), MODEL)
    facts = raised.value.detail.metadata
    assert (facts["datum"], facts["position"], facts["token_id"]) == ("2", "1", "100")


def test_the_sum_reduction_takes_negative_weights():
    spec = forward_backward(
        [1, 2], [0, 2], weights=[1, -1], reduction=losses_pb2.LOSS_REDUCTION_SUM
    )
    assert check_content(spec, MODEL) == 6.0


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (pb.OperationSpec(seq=1, optim_step=pb.OptimStep()), "run_id"),
        (pb.OperationSpec(run_id="r", optim_step=pb.OptimStep()), "seq"),
        (
            pb.OperationSpec(run_id="r", seq=1, request_id="12345678", optim_step=pb.OptimStep()),
            "request_id",
        ),
        (
            pb.OperationSpec(
                seq=1,
                request_id="12345678",
                sample=pb.Sample(weights=pb.SampleWeights(base_model="m")),
            ),
            "seq",
        ),
        (
            pb.OperationSpec(
                request_id="12345678",
                sample=pb.Sample(weights=pb.SampleWeights(version=pb.PinnedVersion(step=1))),
            ),
            "run_id",
        ),
    ],
)
def test_an_operation_is_either_numbered_or_in_a_lane(spec: pb.OperationSpec, field: str):
    with pytest.raises(TenSafeFault) as raised:
        check_identity(spec)
    assert raised.value.detail.metadata["field"] == field


def nested(depth: int) -> dict[str, object]:
    inner: dict[str, object] = {"x": 1}
    for _ in range(depth - 1):
        inner = {"x": inner}
    return inner


@pytest.mark.parametrize(
    "metadata", [nested(17), {"x": float("nan")}, {"x": [1.0, float("inf")]}, {"x": "y" * 70_000}]
)
def test_metadata_that_is_no_small_json_is_refused(metadata: dict[str, object]):
    spec = pb.OperationSpec(run_id="r", seq=1, save_state=pb.SaveState())
    spec.save_state.metadata.update(metadata)
    with pytest.raises(TenSafeFault) as raised:
        check_content(spec, MODEL)
    assert raised.value.detail.metadata["field"] == "save_state.metadata"


def test_metadata_may_be_nested_sixteen_deep():
    spec = pb.OperationSpec(run_id="r", seq=1, save_state=pb.SaveState())
    spec.save_state.metadata.update(nested(16))
    check_content(spec, MODEL)


def test_offsets_that_wrap_around_are_refused():
    spec = forward_backward([1, 2, 3], [0, 2**63 - 1, -(2**63), -1, 3])
    with pytest.raises(TenSafeFault) as raised:
        check_content(spec, MODEL)
    assert raised.value.detail.reason == "INVALID_BATCH"


@pytest.mark.parametrize("seq", [0, 2**53, 2**64 - 1])
def test_a_seq_outside_its_range_is_refused(seq: int):
    with pytest.raises(TenSafeFault) as raised:
        check_identity(pb.OperationSpec(run_id="r", seq=seq, optim_step=pb.OptimStep()))
    assert raised.value.detail.metadata["field"] == "seq"


def sample(*prompts: pb.Prompt, **params: int | bool) -> pb.OperationSpec:
    return pb.OperationSpec(
        run_id="r", seq=1, sample=pb.Sample(prompts=prompts, params=pb.SamplingParams(**params))
    )


IDS = pb.Prompt(tokens=encode(np.array([1, 2, 3], np.int32)))


def test_a_sample_costs_what_it_reads_and_may_write():
    assert check_content(sample(IDS, max_tokens=2), MODEL) == 5
    assert check_content(sample(IDS, IDS, max_tokens=2, num_samples=4), MODEL) == 40
    # The model's context is the other limit.
    assert check_content(sample(IDS, max_tokens=10_000), MODEL) == MODEL.context_length
    text = pb.Prompt(text="x" * 40)
    assert check_content(sample(text, max_tokens=2), Model(name="m")) == pytest.approx(12, abs=2)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 2**20, "num_samples": 8},
        {"max_tokens": 2**18, "top_logprobs": 20},
        {"max_tokens": 1, "num_samples": 1024, "prompt_logprobs": True},
    ],
)
def test_a_sample_whose_result_may_not_fit_into_a_message_is_refused(params: dict[str, int]):
    long = pb.Prompt(tokens=encode(np.zeros(9000, np.int32)))
    with pytest.raises(TenSafeFault) as raised:
        check_content(sample(long, **params), Model(name="m"))
    assert raised.value.detail.metadata["field"] == "sample"
    assert "split the prompts" in raised.value.detail.message


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"top_logprobs": 21}, "sample.params.top_logprobs"),
        ({"max_tokens": 0}, "sample.params.max_tokens"),
        ({"num_samples": 1025}, "sample.params.num_samples"),
        ({"temperature": float("nan")}, "sample.params.temperature"),
        ({"top_p": 0.0}, "sample.params.top_p"),
    ],
)
def test_the_rules_of_sampling_name_their_field(params: dict[str, float], field: str):
    with pytest.raises(TenSafeFault) as raised:
        check_rules(sample(IDS, **params))  # type: ignore[arg-type]
    assert raised.value.detail.metadata["field"] == field


@pytest.mark.parametrize("seconds", [3_153_600_001, 10**12, 2**62])
def test_a_time_to_live_has_an_end(seconds: int):
    """One that passes the calendar's would end the coordinator with the outcome that it cannot
    write, and at every start again."""
    saved = pb.OperationSpec(run_id="run-1", seq=1, save_state=pb.SaveState())
    saved.save_state.ttl.seconds = seconds
    with pytest.raises(TenSafeFault, match="3153600000s"):
        check_rules(saved)
    upload = BeginUploadRequest(request_id="request-1", model_ref="tiny")
    upload.ttl.seconds = seconds
    with pytest.raises(TenSafeFault, match="ttl: must be"):
        check_rules(upload)
    # One that is in the log already is cut.
    over = expires_at(1_800_000_000 * 10**9, saved.save_state.ttl)
    assert over.ToDatetime().year == 2126


def test_a_token_that_the_model_lacks_cannot_end_a_sample():
    spec = sample(IDS)
    spec.sample.params.stop.tokens.extend([1, 100])
    with pytest.raises(TenSafeFault, match="token 100 at position 1") as raised:
        check_content(spec, MODEL)
    assert raised.value.detail.reason == "TOKEN_OUT_OF_RANGE"
    assert raised.value.detail.metadata["field"] == "sample.params.stop.tokens"


def with_loss(
    spec: pb.OperationSpec, name: str, options: dict[str, object] | None = None, **inputs: object
) -> pb.OperationSpec:
    loss = spec.forward_backward.loss
    loss.name = name
    loss.options.update(options or {})
    for given, values in inputs.items():
        tensor = encode(np.asarray(values, np.float32))
        spec.forward_backward.batch.inline.loss_inputs.add(name=given).tensor.CopyFrom(tensor)
    return spec


@pytest.mark.parametrize(
    ("name", "options", "inputs", "reason", "field"),
    [
        ("pp0", {}, {}, "UNSUPPORTED_OPTION", "loss.name"),
        ("ppo", {}, {"logprobs": [0, 0]}, "INVALID_BATCH", "loss_inputs"),
        ("kl", {}, {"logprobs": [0, 0]}, "INVALID_BATCH", "loss_inputs[1]"),
        ("linear", {}, {"gradients": [0]}, "INVALID_BATCH", "gradients"),
        ("linear", {}, {"gradients": [0, np.inf]}, "INVALID_BATCH", "gradients"),
        ("kl", {"way": 1}, {}, "UNSUPPORTED_OPTION", "loss.options.way"),
        ("kl", {"direction": [1]}, {}, "INVALID_ARGUMENT", "loss.options.direction"),
        ("kl", {"direction": None}, {}, "INVALID_ARGUMENT", "loss.options.direction"),
        ("dpo", {}, {}, "INVALID_BATCH", "weights"),
    ],
)
def test_a_call_that_does_not_fit_its_loss_is_refused_by_field(
    name: str, options: dict[str, object], inputs: dict[str, object], reason: str, field: str
):
    spec = with_loss(forward_backward([1, 2], [0, 2]), name, options, **inputs)
    with pytest.raises(TenSafeFault) as raised:
        check_content(spec, MODEL)
    assert (raised.value.detail.reason, raised.value.detail.code) == (reason, "INVALID_ARGUMENT")
    assert raised.value.detail.metadata["field"].endswith(field)


def test_a_reference_costs_a_forward_pass_more():
    assert check_content(with_loss(forward_backward([1, 2], [0, 2]), "kl"), MODEL) == 8.0
    given = {"logprobs": [0, 0], "advantages": [1, -1]}
    assert check_content(with_loss(forward_backward([1, 2], [0, 2]), "ppo", **given), MODEL) == 6.0


def test_a_model_without_cards_leaves_its_losses_to_its_worker():
    spec = with_loss(forward_backward([1, 2], [0, 2]), "whatever", {"x": 1.0})
    assert checks.check_content(spec, MODEL, {}) == 6.0
