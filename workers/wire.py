"""Between `tensafe.v1` messages and the backend's dataclasses, both ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tensafe.v1 import (
    models_pb2,
    operations_pb2,
    privacy_pb2,
    training_pb2,
    types_pb2,
    worker_pb2,
)
from tensafe.wire.loss_messages import card_message, option_values, reduction_of
from tensafe.wire.losses import LossCard
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array, TensorError, decode, encode
from workers.operations import (
    ArtifactWeights,
    Batch,
    ChatMessage,
    Completion,
    FinishReason,
    LoadOutcome,
    LoraSettings,
    LossOutcome,
    LossRequest,
    Metric,
    ModelCard,
    OptimizerSettings,
    PrivacySettings,
    PrivateMetrics,
    PrivateRelease,
    Prompt,
    Reference,
    RunSettings,
    SampleChunk,
    SampleOutcome,
    SamplingParams,
    StepOutcome,
    StepRequest,
    Stop,
)

_DTYPES = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
}
# An element type of ours, and its name on the wire.
_Wanted = tuple[np.dtype[Any], int]
_INT32: _Wanted = (np.dtype("<i4"), types_pb2.DATA_TYPE_INT32)
_INT64: _Wanted = (np.dtype("<i8"), types_pb2.DATA_TYPE_INT64)
_FLOAT32: _Wanted = (np.dtype("<f4"), types_pb2.DATA_TYPE_FLOAT32)
_FINISH_REASONS = {
    FinishReason.STOP: operations_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: operations_pb2.FINISH_REASON_LENGTH,
}
_RESOLVED = ("noise_multiplier", "max_grad_norm", "expected_batch_size")
_ADAM_ONLY = ("beta1", "beta2", "eps")
_DEFAULTS = {"adamw": (0.9, 0.999, 1e-8), "adam": (0.9, 0.999, 1e-8)}


def run_settings(config: training_pb2.RunConfig) -> RunSettings:
    """Reads a run's configuration; unset fields get the page's defaults.

    Raises:
        TenSafeFault: UNSUPPORTED_OPTION for what no backend here does.
    """
    lora = config.lora
    if lora.HasField("bias") and lora.bias != "none":
        raise _unsupported(
            "lora.bias",
            f"bias {lora.bias!r} would train the base model that all tenants share; use 'none'",
        )
    defaults = RunSettings(config.model_ref)
    return RunSettings(
        model_ref=config.model_ref,
        lora=LoraSettings(
            rank=_or(lora, "rank", defaults.lora.rank),
            alpha=_or(lora, "alpha", defaults.lora.alpha),
            dropout=_or(lora, "dropout", defaults.lora.dropout),
            target_modules=tuple(lora.target_modules) or defaults.lora.target_modules,
        ),
        optimizer=_optimizer(config.optimizer),
        accumulation_steps=_or(config, "gradient_accumulation_steps", 1),
        max_steps=_or(config, "max_steps", None),
        seed=_or(config, "seed", 0),
        deterministic=config.deterministic,
        privacy=_privacy(config) if config.dp.enabled else None,
    )


def _privacy(config: training_pb2.RunConfig) -> PrivacySettings:
    dp: Any = config.dp
    if not all(dp.HasField(name) for name in _RESOLVED):
        raise RuntimeError(f"a private run came without {', '.join(_RESOLVED)}")
    raw = dp.metrics == privacy_pb2.DP_METRICS_MODE_RAW_TO_OWNER
    optional = ("loss_noise_multiplier", "max_loss", "test_seed")
    return PrivacySettings(
        noise_multiplier=dp.noise_multiplier,
        max_grad_norm=dp.max_grad_norm,
        expected_batch_size=dp.expected_batch_size,
        metrics=PrivateMetrics.RAW_TO_OWNER if raw else PrivateMetrics.PRIVATE,
        **{name: getattr(dp, name) for name in optional if dp.HasField(name)},
    )


def _optimizer(message: training_pb2.OptimizerConfig) -> OptimizerSettings:
    defaults = OptimizerSettings()
    name = _or(message, "name", defaults.name)
    if name not in ("adamw", "adam", "sgd"):
        raise _unsupported("optimizer.name", f"no optimizer {name!r}; use adamw, adam or sgd")
    lacking = _ADAM_ONLY if name == "sgd" else ("momentum",)
    for option in lacking:
        if message.HasField(option):  # type: ignore[arg-type]
            raise _unsupported(f"optimizer.{option}", f"{name} has no {option}; leave it unset")
    beta1, beta2, eps = _DEFAULTS.get(name, (None, None, None))
    return OptimizerSettings(
        name=name,
        learning_rate=_or(message, "learning_rate", defaults.learning_rate),
        weight_decay=_or(message, "weight_decay", defaults.weight_decay),
        beta1=_or(message, "beta1", beta1),
        beta2=_or(message, "beta2", beta2),
        eps=_or(message, "eps", eps),
        momentum=_or(message, "momentum", 0.0 if name == "sgd" else None),
        grad_clip_norm=_or(message, "grad_clip_norm", None),
    )


def loss_request(
    message: training_pb2.Forward | training_pb2.ForwardBackward,
    artifact_directory: Callable[[str], Path],
) -> LossRequest:
    """Reads a batch and its loss; contents are the backend's to check.

    Args:
        artifact_directory: where an artifact's files lie, of one that is named as reference.

    Raises:
        TenSafeFault: INVALID_BATCH for tensors that are malformed; UNSUPPORTED_OPTION.
    """
    loss = message.loss
    if message.batch.WhichOneof("source") != "inline":
        raise _unsupported("batch.blob_ref", "this server takes no blobs; send the batch inline")
    reference = None
    if loss.HasField("reference"):
        artifact_id = loss.reference.artifact_id
        reference = Reference(
            loss.reference.WhichOneof("source") or "base",
            ArtifactWeights(artifact_id, artifact_directory(artifact_id)) if artifact_id else None,
        )
    return LossRequest(
        _batch(message.batch.inline),
        loss=_or(loss, "name", "cross_entropy"),
        reduction=reduction_of(loss.reduction),
        options=option_values(loss),
        reference=reference,
        dropout=isinstance(message, training_pb2.Forward) and message.dropout,
    )


def gradient_request(
    planned: worker_pb2.PlannedOperation,
    message: training_pb2.ForwardBackward,
    artifact_directory: Callable[[str], Path],
) -> LossRequest:
    """As `loss_request`, with the units that the coordinator has numbered."""
    request = loss_request(message, artifact_directory)
    request.batch.units = _units(planned, message.batch.inline)
    return request


def private_request(piece: worker_pb2.FetchPrivateBatchResponse) -> LossRequest:
    """Rows that were drawn for a private step."""
    batch = _batch(piece.batch)
    batch.units = _units(piece, piece.batch)
    return LossRequest(batch)


def _units(
    planned: worker_pb2.PlannedOperation | worker_pb2.FetchPrivateBatchResponse,
    batch: training_pb2.Batch,
) -> Any:
    if planned.HasField("units"):
        return _array(planned.units, _INT32, "units")
    if batch.unit_ids:
        raise RuntimeError("a batch with unit ids came without the numbers of its units")
    return None


def _batch(message: training_pb2.Batch) -> Batch:
    batch = Batch(
        offsets=_array(message.offsets, _INT64, "batch.offsets"),
        input_tokens=_array(message.input_tokens, _INT32, "batch.input_tokens"),
    )
    seen: set[str] = set()
    for named in message.loss_inputs:
        name = named.name
        where = "batch." + name
        if named.HasField("offsets") and named.offsets != message.offsets:
            raise _invalid_batch(where, "its offsets differ from the batch's; leave them unset")
        if name in seen:
            raise _invalid_batch(where, "it is given twice; send it once")
        seen.add(name)
        if name == "target_tokens":
            batch.target_tokens = _array(named.tensor, _INT32, where, wide=True)
        elif name == "weights":
            batch.weights = _array(named.tensor, _FLOAT32, where, wide=True)
        else:
            batch.inputs[name] = _input(named.tensor, where)
    return batch


def _input(tensor: types_pb2.Tensor, where: str) -> Any:
    """A tensor that only the loss knows: of one of the two types that losses take."""
    whole = tensor.dtype in (types_pb2.DATA_TYPE_INT32, types_pb2.DATA_TYPE_INT64)
    return _array(tensor, _INT32 if whole else _FLOAT32, where, wide=True)


def _array(tensor: types_pb2.Tensor, wanted: _Wanted, where: str, *, wide: bool = False) -> Any:
    dtype, wire_type = wanted
    shape, data = tensor.shape, tensor.data
    if tensor.dtype == wire_type and len(shape) == 1 and shape[0] * dtype.itemsize == len(data):
        # What nearly every tensor is; `decode` and its checks cost several times as much.
        return np.frombuffer(data, dtype)
    try:
        array = decode(tensor)
    except TensorError as error:
        raise _invalid_batch(where, str(error)) from error
    if array.ndim not in ((1, 2) if wide else (1,)):
        allowed = "one, or two" if wide else "one"
        raise _invalid_batch(where, f"it has {array.ndim} dimensions; it must have {allowed}")
    if array.dtype != dtype:
        # Exact or refused: an int64 token id must not wrap round into the vocabulary.
        if array.dtype.kind != dtype.kind:
            raise _invalid_batch(where, f"it is {array.dtype}; send {dtype.name}")
        if array.dtype.kind == "i" and array.size:
            limits = np.iinfo(dtype)
            if array.min() < limits.min or array.max() > limits.max:
                raise _invalid_batch(where, f"a value does not fit into {dtype.name}")
        array = array.astype(dtype)
    return array


def step_request(
    planned: worker_pb2.PlannedOperation,
    message: training_pb2.OptimStep | training_pb2.PrivateStep,
) -> StepRequest:
    """Reads the per-call overrides of an optim_step, and whether it may release anything."""
    return StepRequest(
        _or(message, "learning_rate", None),
        _or(message, "weight_decay", None),
        _or(message, "grad_clip_norm", None),
        charged=planned.HasField("charge"),
    )


def prompts(message: training_pb2.Sample) -> list[Prompt]:
    """Reads the prompts of a SAMPLE."""
    return [_prompt(prompt, index) for index, prompt in enumerate(message.prompts)]


def _prompt(message: training_pb2.Prompt, index: int) -> Prompt:
    kind = message.WhichOneof("content")
    if kind == "text":
        return Prompt(text=message.text)
    if kind == "tokens":
        return Prompt(tokens=_array(message.tokens, _INT32, f"prompts[{index}].tokens"))
    return Prompt(chat=tuple(ChatMessage(m.role, m.content) for m in message.chat.messages))


def sampling_params(message: training_pb2.SamplingParams) -> SamplingParams:
    """Reads how to sample; unset fields get the contract's defaults."""
    defaults = SamplingParams()
    stop = None
    if message.HasField("stop"):
        stop = Stop(tuple(message.stop.strings), tuple(message.stop.tokens))
    return SamplingParams(
        max_tokens=_or(message, "max_tokens", defaults.max_tokens),
        temperature=_or(message, "temperature", defaults.temperature),
        top_p=_or(message, "top_p", defaults.top_p),
        top_k=_or(message, "top_k", defaults.top_k),
        min_p=_or(message, "min_p", defaults.min_p),
        seed=_or(message, "seed", None),
        stop=stop,
        num_samples=_or(message, "num_samples", defaults.num_samples),
        top_logprobs=message.top_logprobs,
        prompt_logprobs=message.prompt_logprobs,
    )


def _metrics(metrics: list[Metric]) -> list[types_pb2.Metric]:
    return [
        types_pb2.Metric(
            name=metric.name,
            value=metric.value,
            reduction=int(metric.combine),  # type: ignore[arg-type]
            weight=metric.weight,
        )
        for metric in metrics
    ]


def step_metrics(outcome: StepOutcome) -> list[types_pb2.Metric]:
    """Metrics of an applied update; empty otherwise."""
    return _metrics(outcome.metrics)


def _fill(
    message: operations_pb2.ForwardResult | operations_pb2.ForwardBackwardResult,
    outcome: LossOutcome,
) -> None:
    # In place: messages that are built apart are copied when they are put together.
    message.SetInParent()
    for metric in outcome.metrics:
        message.metrics.add(
            name=metric.name,
            value=metric.value,
            reduction=int(metric.combine),
            weight=metric.weight,
        )
    for name, output in outcome.outputs.items():
        values, item = output.values, message.outputs.add(name=name)
        item.tensor.dtype = types_pb2.DATA_TYPE_FLOAT32
        item.tensor.shape.extend(values.shape)
        item.tensor.data = values.astype("<f4", copy=False).tobytes()
        if output.per_datum:
            item.offsets.CopyFrom(encode(np.arange(len(values) + 1, dtype=np.int64)))


def forward_result(outcome: LossOutcome) -> operations_pb2.OperationResult:
    """Packs a FORWARD's outcome."""
    result = operations_pb2.OperationResult()
    _fill(result.forward, outcome)
    return result


def forward_backward_result(outcome: LossOutcome) -> operations_pb2.OperationResult:
    """Packs a FORWARD_BACKWARD's outcome."""
    result = operations_pb2.OperationResult()
    _fill(result.forward_backward, outcome)
    return result


def optim_step_result(outcome: StepOutcome) -> operations_pb2.OperationResult:
    """Packs an OPTIM_STEP's outcome."""
    return operations_pb2.OperationResult(
        optim_step=operations_pb2.OptimStepResult(
            step=outcome.step,
            applied=outcome.applied,
            learning_rate=outcome.learning_rate,
            grad_norm=outcome.grad_norm,
            dp=None if outcome.release is None else _dp_metrics(outcome.release),
        )
    )


def _dp_metrics(release: PrivateRelease) -> privacy_pb2.DpMetrics:
    """What the worker knows of it; what it has cost is the coordinator's."""
    return privacy_pb2.DpMetrics(
        noise_applied=release.noise_applied,
        num_clipped=release.num_clipped,
        noised_loss=release.noised_loss,
    )


def sample_result(outcome: SampleOutcome) -> operations_pb2.OperationResult:
    """Packs a SAMPLE's outcome."""
    result = operations_pb2.SampleResult(model_step=outcome.model_step)
    seen: Counter[int] = Counter()
    for item in outcome.completions:
        result.completions.append(_completion(item, seen[item.prompt_index]))
        seen[item.prompt_index] += 1
    return operations_pb2.OperationResult(sample=result)


def _completion(item: Completion, sample_index: int) -> operations_pb2.Completion:
    return operations_pb2.Completion(
        prompt_index=item.prompt_index,
        sample_index=sample_index,
        prompt=item.prompt,
        completion=item.text,
        tokens=encode(item.tokens),
        logprobs=encode(item.logprobs),
        raw_logprobs=encode(item.raw_logprobs),
        top_tokens=_encode_if(item.top_tokens),
        top_logprobs=_encode_if(item.top_logprobs),
        prompt_logprobs=_encode_if(item.prompt_logprobs),
        finish_reason=_FINISH_REASONS[item.finish_reason],
        prompt_tokens=item.prompt_tokens,
    )


def _encode_if(array: Array | None) -> types_pb2.Tensor | None:
    return None if array is None else encode(array)


def sample_chunk(epoch: int, chunk: SampleChunk) -> worker_pb2.SampleChunk:
    """Packs what a running SAMPLE has drawn."""
    return worker_pb2.SampleChunk(
        operation_id=chunk.operation_id,
        epoch=epoch,
        chunk=operations_pb2.TokenChunk(
            prompt_index=chunk.prompt_index,
            sample_index=chunk.sample,
            position=chunk.position,
            tokens=encode(chunk.tokens),
            logprobs=encode(chunk.logprobs),
            raw_logprobs=encode(chunk.raw_logprobs),
            text=chunk.text,
        ),
    )


def load_state_result(artifact_id: str, outcome: LoadOutcome) -> operations_pb2.OperationResult:
    """Packs a LOAD_STATE's outcome."""
    return operations_pb2.OperationResult(
        load_state=operations_pb2.LoadStateResult(
            artifact_id=artifact_id,
            step=outcome.step,
            optimizer_restored=outcome.optimizer_restored,
        )
    )


def publish_request(card: ModelCard, losses: Sequence[LossCard]) -> worker_pb2.PublishModelRequest:
    """Packs a model, what may be minimised on it, and its tokenizer's files."""
    return worker_pb2.PublishModelRequest(
        model=models_pb2.Model(
            name=card.name,
            references=card.references,
            architecture=card.architecture,
            parameters=card.parameters,
            vocabulary_size=card.vocabulary_size,
            context_length=card.context_length,
            dtype=_DTYPES.get(card.dtype, types_pb2.DATA_TYPE_UNSPECIFIED),
            linear_modules=[
                models_pb2.LinearModule(name=name, count=count)
                for name, count in sorted(card.linear_modules.items())
            ],
            has_chat_template=card.has_chat_template,
            tokenizer_sha256=card.tokenizer_sha256,
            accepts_any_reference=card.accepts_any_reference,
            losses=[card_message(loss) for loss in losses],
        ),
        tokenizer_files=[
            worker_pb2.ModelFile(name=name, data=data)
            for name, data in sorted(card.tokenizer_files.items())
        ],
    )


def _or(message: Any, field: str, default: Any) -> Any:
    """An optional scalar, or `default` where it is unset."""
    return getattr(message, field) if message.HasField(field) else default


def _unsupported(field: str, text: str) -> TenSafeFault:
    return TenSafeFault("UNSUPPORTED_OPTION", f"{field}: {text}", field=field)


def _invalid_batch(field: str, text: str) -> TenSafeFault:
    return TenSafeFault("INVALID_BATCH", f"{field}: {text}", field=field)
