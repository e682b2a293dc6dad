"""What must be true of an operation before it is queued, beyond the rules in the protos.

Token buffers are only looked at, never changed: a bad one is refused here, before it can reach a
worker, and the worker checks again.
"""

from __future__ import annotations

import math

import numpy as np
from google.protobuf.struct_pb2 import Struct

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.models_pb2 import Model
from tensafe.v1.types_pb2 import Tensor
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array, TensorError, decode
from tensafe_server.operations.loss_checks import Losses, check_loss
from tensafe_server.operations.validation import refused
from tensafe_server.operations.vocabulary import check_vocabulary

KINDS = {
    "forward": ops.OPERATION_KIND_FORWARD,
    "forward_backward": ops.OPERATION_KIND_FORWARD_BACKWARD,
    "optim_step": ops.OPERATION_KIND_OPTIM_STEP,
    "sample": ops.OPERATION_KIND_SAMPLE,
    "save_state": ops.OPERATION_KIND_SAVE_STATE,
    "load_state": ops.OPERATION_KIND_LOAD_STATE,
    "private_step": ops.OPERATION_KIND_PRIVATE_STEP,
}
_INT32, _INT64 = np.dtype("<i4"), np.dtype("<i8")
_FIELDS = {
    (kind, part): f"{kind}.batch.inline.{part}"
    for kind in ("forward", "forward_backward")
    for part in ("offsets", "input_tokens")
}
_MAX_METADATA_BYTES = 64 * 1024
_MAX_METADATA_DEPTH = 16
_LARGEST_SEQ = 2**53 - 1
_MAX_SAMPLE_BYTES = 32 * 2**20
# A sampled token with its two log-probabilities and its text; about what one is in a text.
_TOLD_BYTES = 16
_BYTES_OF_A_TOKEN = 4


BACKWARD_FACTOR = 3.0
"""Cost of a token in a forward_backward, in forwarded tokens."""
_OTHER_COST = 16.0


def is_numbered(spec: training.OperationSpec) -> bool:
    """Whether the operation takes a place in its run's order."""
    if spec.WhichOneof("operation") != "sample":
        return True
    return spec.sample.weights.WhichOneof("source") in (None, "current")


def has_place(spec: training.OperationSpec) -> bool:
    """Whether it names a place in a run's order, be it otherwise right or wrong."""
    return spec.HasField("run_id") and spec.HasField("seq") and 1 <= spec.seq <= _LARGEST_SEQ


def check_identity(spec: training.OperationSpec) -> None:
    """Checks run_id, seq and request_id against the kind of operation.

    Raises:
        TenSafeFault: INVALID_ARGUMENT.
    """
    if is_numbered(spec):
        needed, banned = ["run_id", "seq"], ["request_id"]
    else:
        source = spec.sample.weights.WhichOneof("source")
        needed, banned = ["request_id"], ["seq"]
        (needed if source == "version" else banned).append("run_id")
    if spec.HasField("seq") and not 1 <= spec.seq <= _LARGEST_SEQ:
        raise refused([("seq", f"must be from 1 to {_LARGEST_SEQ}")])
    if spec.HasField("request_id") and not 8 <= len(spec.request_id) <= 64:
        raise refused([("request_id", "must have from 8 to 64 characters")])
    broken = [(name, "is required here") for name in needed if not spec.HasField(name)]  # type: ignore[arg-type]
    broken += [(name, "must be unset here") for name in banned if spec.HasField(name)]  # type: ignore[arg-type]
    if broken:
        raise refused(broken)


def check_content(
    spec: training.OperationSpec, model: Model, losses: Losses, *, private: bool = False
) -> float:
    """Checks an operation against its model and returns its cost, in forwarded tokens.

    Args:
        losses: the model's, by name.
        private: whether its run is; then a forward_backward may have no datum.

    Raises:
        TenSafeFault: INVALID_ARGUMENT or OUT_OF_RANGE, naming the field.
    """
    kind = spec.WhichOneof("operation")
    if kind == "forward":
        return _check_batch(spec.forward, "forward", model, losses, 1.0, private=private)
    if kind == "forward_backward":
        operation = spec.forward_backward
        factor = BACKWARD_FACTOR
        return _check_batch(operation, kind, model, losses, factor, private=private)
    if kind == "sample":
        return _check_sample(spec.sample, model)
    if kind == "save_state":
        check_metadata(spec.save_state.metadata, "save_state.metadata")
    return _OTHER_COST


def check_metadata(metadata: Struct, field: str) -> None:
    """Checks a caller's own JSON object for size, depth and numbers.

    Raises:
        TenSafeFault: INVALID_ARGUMENT.
    """
    if metadata.ByteSize() > _MAX_METADATA_BYTES:
        raise refused([(field, f"must be at most {_MAX_METADATA_BYTES} bytes")])
    values = [(value, 1) for value in metadata.fields.values()]
    while values:
        value, depth = values.pop()
        if depth > _MAX_METADATA_DEPTH:
            raise refused([(field, f"must be nested at most {_MAX_METADATA_DEPTH} levels deep")])
        if value.HasField("struct_value"):
            values += [(inner, depth + 1) for inner in value.struct_value.fields.values()]
        elif value.HasField("list_value"):
            values += [(inner, depth + 1) for inner in value.list_value.values]
        elif value.HasField("number_value") and not math.isfinite(value.number_value):
            raise refused([(field, "must hold finite numbers only, as JSON does")])


def _check_batch(
    operation: training.Forward | training.ForwardBackward,
    kind: str,
    model: Model,
    losses: Losses,
    factor: float,
    *,
    private: bool,
) -> float:
    if operation.batch.WhichOneof("source") != "inline":
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            "this server takes batches inline only; split the batch over several calls instead",
            field=f"{kind}.batch.blob_ref",
        )
    batch = operation.batch.inline
    field = _FIELDS[kind, "offsets"]
    try:
        offsets = _offsets(batch.offsets, may_be_empty=private and kind == "forward_backward")
        total: int = offsets.item(-1)
        _check_context(offsets, field, model)
        field = _FIELDS[kind, "input_tokens"]
        tokens = _tokens(batch.input_tokens, total)
    except TensorError as error:
        raise TenSafeFault("INVALID_BATCH", str(error), field=field) from error
    check_vocabulary(tokens, field, model, offsets)
    compares = check_loss(operation, kind, offsets, model, losses, private=private)
    # The reference's forward pass comes on top.
    return max(1.0, total) * (factor + compares)


def _check_sample(sample: training.Sample, model: Model) -> float:
    params = sample.params
    wanted = params.max_tokens if params.HasField("max_tokens") else 128
    count = params.num_samples if params.HasField("num_samples") else 1
    if params.stop.tokens:
        ending = np.asarray(params.stop.tokens, _INT32)
        check_vocabulary(ending, "sample.params.stop.tokens", model)
    lengths = [_prompt_length(prompt, i, model) for i, prompt in enumerate(sample.prompts)]
    cost, size = 0, 0
    for length, prompt in zip(lengths, sample.prompts, strict=True):
        drawn = wanted
        if model.context_length:
            drawn = max(1, min(wanted, model.context_length - length))
        cost += count * (length + drawn)
        told = drawn * (_TOLD_BYTES + 8 * params.top_logprobs)
        told += length * 4 if params.prompt_logprobs else 0
        size += count * (told + prompt.ByteSize())
    if size > _MAX_SAMPLE_BYTES:
        raise refused(
            [
                (
                    "sample",
                    f"its result may need {size} bytes, by max_tokens, num_samples and what is "
                    f"asked for of each token; the limit is {_MAX_SAMPLE_BYTES}: ask for fewer, or "
                    "split the prompts over several calls",
                )
            ]
        )
    return float(cost)


def _prompt_length(prompt: training.Prompt, index: int, model: Model) -> int:
    """Its tokens; of text, which only the worker can count, about as many."""
    if prompt.WhichOneof("content") != "tokens":
        return 1 + prompt.ByteSize() // _BYTES_OF_A_TOKEN
    field = f"sample.prompts[{index}].tokens"
    try:
        tokens = decode(prompt.tokens)
    except TensorError as error:
        raise TenSafeFault("INVALID_BATCH", str(error), field=field) from error
    if tokens.ndim != 1 or tokens.dtype != _INT32 or not len(tokens):
        raise TenSafeFault(
            "INVALID_BATCH",
            f"prompt {index} must be an int32 vector with at least one token",
            field=field,
        )
    check_vocabulary(tokens, field, model)
    if model.context_length and len(tokens) >= model.context_length:
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"prompt {index} has {len(tokens)} tokens, the context of {model.name} is "
            f"{model.context_length}: nothing can follow it; cut it",
            field=field,
        )
    return len(tokens)


def _offsets(tensor: Tensor, *, may_be_empty: bool) -> Array:
    offsets = decode(tensor)
    if offsets.dtype != _INT64 or offsets.ndim != 1:
        raise TensorError("must be an int64 vector")
    if len(offsets) < 2 - may_be_empty:
        raise TensorError("the batch is empty; send at least one datum")
    if offsets.item(0) != 0 or np.count_nonzero(offsets[1:] <= offsets[:-1]):
        raise TensorError("must begin at 0 and increase strictly: every datum has a token")
    return offsets


def _check_context(offsets: Array, field: str, model: Model) -> None:
    limit = model.context_length
    if not limit or offsets.item(-1) <= limit:
        return
    lengths = offsets[1:] - offsets[:-1]
    datum = int(lengths.argmax())
    if lengths[datum] > limit:
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"datum {datum} has {lengths[datum]} tokens, the context of {model.name} is {limit}; "
            "cut or split it",
            field=field,
            datum=datum,
            context_length=limit,
        )


def _tokens(tensor: Tensor, total: int) -> Array:
    tokens = decode(tensor)
    if tokens.dtype != _INT32 or tokens.ndim != 1:
        raise TensorError("must be an int32 vector")
    if len(tokens) != total:
        raise TensorError(f"has {len(tokens)} tokens, the offsets end at {total}")
    return tokens
