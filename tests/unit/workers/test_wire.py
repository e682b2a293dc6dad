"""What a worker reads from the wire, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import protovalidate
import pytest
from unit.workers.planned import batch

from tensafe.v1 import losses_pb2, training_pb2, types_pb2
from tensafe.v1.privacy_pb2 import DP_METRICS_MODE_RAW_TO_OWNER, DpConfig
from tensafe.wire.losses import Reduction
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import encode
from workers import wire
from workers.losses import LossRegistry
from workers.operations import (
    LossRequest,
    ModelCard,
    OptimizerSettings,
    PrivacySettings,
    PrivateMetrics,
    RunSettings,
)


def test_an_empty_configuration_is_the_pages_defaults():
    settings = wire.run_settings(training_pb2.RunConfig(model_ref="m"))
    assert settings == RunSettings("m")
    assert settings.lora.target_modules == ("q_proj", "v_proj", "k_proj", "o_proj")


def test_privacy_is_what_the_ledger_charges_for():
    own = {
        "noise_multiplier": 1.5,
        "max_grad_norm": 0.25,
        "expected_batch_size": 12.5,
        "loss_noise_multiplier": 3.0,
        "max_loss": 7.0,
        "test_seed": 11,
    }
    raw = DP_METRICS_MODE_RAW_TO_OWNER
    config = training_pb2.RunConfig(model_ref="m", dp=DpConfig(enabled=True, metrics=raw, **own))
    expected = PrivacySettings(metrics=PrivateMetrics.RAW_TO_OWNER, **own)
    assert wire.run_settings(config).privacy == expected
    config.dp.ClearField("metrics")
    config.dp.ClearField("test_seed")
    found = wire.run_settings(config).privacy
    assert found == replace(expected, metrics=PrivateMetrics.PRIVATE, test_seed=None)
    config.dp.ClearField("noise_multiplier")
    with pytest.raises(RuntimeError, match="noise_multiplier"):
        wire.run_settings(config)


BOUNDS = {
    "alpha": (training_pb2.LoraConfig, 1e-3, 1e6),
    "learning_rate": (training_pb2.OptimizerConfig, 0.0, 1e6),
    "weight_decay": (training_pb2.OptimizerConfig, 0.0, 1e6),
    "eps": (training_pb2.OptimizerConfig, 1e-30, 1.0),
    "grad_clip_norm": (training_pb2.OptimizerConfig, 1e-30, 1e30),
    "step's learning_rate": (training_pb2.OptimStep, 0.0, 1e6),
    "step's weight_decay": (training_pb2.OptimStep, 0.0, 1e6),
    "step's grad_clip_norm": (training_pb2.OptimStep, 1e-30, 1e30),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_contract_keeps_numbers_within_float32(name):
    """The engine computes in float32; what is out of its range is refused before it queues."""
    kind, least, most = BOUNDS[name]
    field = name.removeprefix("step's ")
    for value in (least, most):
        protovalidate.validate(kind(**{field: value}))
        assert np.isfinite(np.float32(value))
        assert value == 0 or np.float32(value) > 0
    # The least is itself excluded for alpha, whose bound is 0.
    below = 0.0 if field == "alpha" else least * 0.5 or -1e-9
    for value in (below, most * 1.001, 1e39, float("nan"), float("inf")):
        with pytest.raises(protovalidate.ValidationError, match=field):
            protovalidate.validate(kind(**{field: value}))


def test_presence_is_not_truth():
    config = training_pb2.RunConfig(
        model_ref="m",
        lora=training_pb2.LoraConfig(dropout=0.0),
        optimizer=training_pb2.OptimizerConfig(weight_decay=0.0, learning_rate=0.0),
        seed=0,
    )
    settings = wire.run_settings(config)
    assert (settings.lora.dropout, settings.optimizer.weight_decay) == (0.0, 0.0)
    assert settings.optimizer.learning_rate == 0.0
    params = wire.sampling_params(
        training_pb2.SamplingParams(temperature=0.0, seed=0, stop=training_pb2.Stop())
    )
    assert (params.temperature, params.seed) == (0.0, 0)
    assert params.stop is not None
    assert params.stop.tokens == params.stop.strings == ()
    assert wire.sampling_params(training_pb2.SamplingParams()).stop is None


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"lora": {"bias": "all"}}, "lora.bias"),
        ({"optimizer": {"name": "sgd", "beta1": 0.9}}, "optimizer.beta1"),
        ({"optimizer": {"name": "sgd", "eps": 1e-8}}, "optimizer.eps"),
        ({"optimizer": {"momentum": 0.0}}, "optimizer.momentum"),
        ({"optimizer": {"name": "adam", "momentum": 0.9}}, "optimizer.momentum"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name"),
    ],
)
def test_unsupported_options_name_their_field(config, field):
    with pytest.raises(TenSafeFault) as caught:
        wire.run_settings(training_pb2.RunConfig(model_ref="m", **config))
    assert caught.value.detail.reason == "UNSUPPORTED_OPTION"
    assert caught.value.detail.metadata["field"] == field


def test_sgd_has_momentum_and_no_betas():
    config = training_pb2.RunConfig(model_ref="m", optimizer={"name": "sgd", "momentum": 0.5})
    assert wire.run_settings(config).optimizer == OptimizerSettings(
        "sgd", beta1=None, beta2=None, eps=None, momentum=0.5
    )


def loss_request(message: training_pb2.Forward | training_pb2.ForwardBackward) -> LossRequest:
    return wire.loss_request(message, lambda artifact_id: Path("/artifacts") / artifact_id)


def test_a_batch_and_its_reduction():
    loss = losses_pb2.LossConfig(reduction=losses_pb2.LOSS_REDUCTION_SUM)
    request = loss_request(training_pb2.Forward(batch=batch(), loss=loss))
    assert request.reduction is Reduction.SUM
    assert request.loss == "cross_entropy"
    assert request.batch.offsets.tolist() == [0, 3, 5]
    assert request.batch.target_tokens.tolist() == [4, 5, 6, 7, 8]
    wide = loss_request(
        training_pb2.Forward(batch=batch(target_tokens=np.asarray([1, 2, 3, 4, 5])))
    )
    assert wide.batch.target_tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": np.ones((5, 1, 1), np.float32)}, "3 dimensions"),
        ({"weights": np.ones(5, np.int32)}, "send float32"),
        ({"target_tokens": np.ones(5, np.float32)}, "send int32"),
        # Wrapped round, this would be a token id like any other.
        ({"target_tokens": np.full(5, 2**32 + 7)}, "does not fit"),
        ({"advantages": np.ones((5, 1, 1), np.float32)}, "3 dimensions"),
    ],
)
def test_malformed_tensors(changes, says):
    with pytest.raises(TenSafeFault, match=says) as caught:
        loss_request(training_pb2.Forward(batch=batch(**changes)))
    assert caught.value.detail.reason == "INVALID_BATCH"


def test_a_loss_with_options_inputs_and_a_reference():
    loss = losses_pb2.LossConfig(name="ppo", reference={"artifact_id": "art-1"})
    loss.options.update({"clip_low": 0.5, "kl_coef": 0.0, "word": "x", "flag": False})
    message = training_pb2.Forward(
        batch=batch(advantages=np.ones(5, np.float32), kinds=np.arange(5, dtype=np.int32)),
        loss=loss,
        dropout=True,
    )
    request = loss_request(message)
    assert request.loss == "ppo"
    assert request.reduction is None
    assert request.options == {"clip_low": 0.5, "kl_coef": 0.0, "word": "x", "flag": False}
    assert request.reference.source == "artifact_id"
    assert request.reference.artifact.directory == Path("/artifacts/art-1")
    assert request.dropout
    assert request.batch.inputs["advantages"].dtype == np.float32
    assert request.batch.inputs["kinds"].dtype == np.int32
    plain = loss_request(training_pb2.ForwardBackward(batch=batch()))
    assert (plain.options, plain.reference, plain.dropout) == ({}, None, False)


def test_own_offsets_must_be_the_batchs():
    payload = batch()
    payload.inline.loss_inputs[0].offsets.CopyFrom(encode(np.asarray([0, 2, 5])))
    with pytest.raises(TenSafeFault, match="offsets differ"):
        loss_request(training_pb2.Forward(batch=payload))
    payload.inline.loss_inputs[0].offsets.CopyFrom(payload.inline.offsets)
    loss_request(training_pb2.Forward(batch=payload))


def test_blobs_are_refused():
    payload = training_pb2.Payload(blob_ref="sha256:00")
    with pytest.raises(TenSafeFault) as caught:
        loss_request(training_pb2.Forward(batch=payload))
    assert caught.value.detail.reason == "UNSUPPORTED_OPTION"


def test_a_published_model():
    card = ModelCard(
        "m",
        ("hub/m",),
        dtype="bfloat16",
        linear_modules={"v": 2, "q": 1},
        tokenizer_files={"a": b"1"},
    )
    request = wire.publish_request(card, LossRegistry().cards())
    assert request.model.dtype == types_pb2.DATA_TYPE_BFLOAT16
    assert [(m.name, m.count) for m in request.model.linear_modules] == [("q", 1), ("v", 2)]
    assert request.tokenizer_files[0].data == b"1"
