"""What must be true of an operation before it is queued, beyond the rules in the protos.

Token buffers are only looked at, never changed: a bad one is refused here, before it can reach a
worker, and the worker checks again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tensafe.v1 import operations_pb2 as ops
from tensafe.v1 import training_pb2 as training
from tensafe.v1.models_pb2 import Model
from tensafe.v1.types_pb2 import NamedTensor
from tensafe.wire.status import TenSafeFault
from tensafe.wire.tensors import Array, TensorError, decode
from tensafe_server.operations.validation import refused

KINDS = {
    "forward": ops.OPERATION_KIND_FORWARD,
    "forward_backward": ops.OPERATION_KIND_FORWARD_BACKWARD,
    "optim_step": ops.OPERATION_KIND_OPTIM_STEP,
    "sample": ops.OPERATION_KIND_SAMPLE,
    "save_state": ops.OPERATION_KIND_SAVE_STATE,
    "load_state": ops.OPERATION_KIND_LOAD_STATE,
}
_LOSS_INPUTS = {"cross_entropy": {"target_tokens": True, "weights": False}}
_MAX_METADATA_BYTES = 64 * 1024


def is_numbered(spec: training.OperationSpec) -> bool:
    """Whether the operation takes a place in its run's order."""
    if spec.WhichOneof("operation") != "sample":
        return True
    return spec.sample.weights.WhichOneof("source") in (None, "current")


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
    broken = [(name, "is required here") for name in needed if not spec.HasField(name)]  # type: ignore[arg-type]
    broken += [(name, "must be unset here") for name in banned if spec.HasField(name)]  # type: ignore[arg-type]
    if broken:
        raise refused(broken)


def check_content(spec: training.OperationSpec, model: Model) -> float:
    """Checks an operation against its model and returns its cost, in forwarded tokens.

    Raises:
        TenSafeFault: INVALID_ARGUMENT or OUT_OF_RANGE, naming the field.
    """
    kind = spec.WhichOneof("operation")
    if kind == "forward":
        return _check_batch(spec.forward, "forward", model)
    if kind == "forward_backward":
        return 3.0 * _check_batch(spec.forward_backward, "forward_backward", model)
    if kind == "sample":
        return _check_sample(spec.sample, model)
    if kind == "save_state" and spec.save_state.metadata.ByteSize() > _MAX_METADATA_BYTES:
        raise refused([("save_state.metadata", f"must be at most {_MAX_METADATA_BYTES} bytes")])
    return 16.0


def _check_batch(
    operation: training.Forward | training.ForwardBackward, kind: str, model: Model
) -> float:
    path = f"{kind}.batch.inline"
    if operation.batch.WhichOneof("source") != "inline":
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            "this server takes batches inline only; split the batch over several calls instead",
            field=f"{kind}.batch.blob_ref",
        )
    batch = operation.batch.inline
    offsets = _checked(lambda: _offsets(batch), f"{path}.offsets")
    tokens = _checked(lambda: _tokens(batch, int(offsets[-1])), f"{path}.input_tokens")
    lengths = np.diff(offsets)
    if model.context_length and int(lengths.max()) > model.context_length:
        row = int(lengths.argmax())
        raise TenSafeFault(
            "CONTEXT_EXCEEDED",
            f"datum {row} has {int(lengths[row])} tokens, the context of {model.name} is "
            f"{model.context_length}; cut or split it",
            field=f"{path}.offsets",
            datum=row,
            context_length=model.context_length,
        )
    _check_vocabulary(tokens, f"{path}.input_tokens", model)
    _check_loss(operation, kind, batch, len(tokens), model)
    return float(len(tokens))


def _check_loss(
    operation: training.Forward | training.ForwardBackward,
    kind: str,
    batch: training.Batch,
    total: int,
    model: Model,
) -> None:
    name = operation.loss.name if operation.loss.HasField("name") else "cross_entropy"
    inputs = _LOSS_INPUTS.get(name)
    if inputs is None:
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            f"no loss {name!r}; this server has {', '.join(sorted(_LOSS_INPUTS))}",
            field=f"{kind}.loss.name",
        )
    given = {}
    for index, item in enumerate(batch.loss_inputs):
        field = f"{kind}.batch.inline.loss_inputs[{index}]"
        if item.name not in inputs or item.name in given:
            known = ", ".join(sorted(inputs))
            problem = "given twice" if item.name in given else f"unknown to {name}"
            raise TenSafeFault(
                "INVALID_BATCH",
                f"loss input {item.name!r} is {problem}; it takes {known}",
                field=field,
            )
        given[item.name] = _per_token(item, field, total)
    for required in (key for key, needed in inputs.items() if needed and key not in given):
        raise TenSafeFault(
            "INVALID_BATCH",
            f"{name} needs the loss input {required!r}",
            field=f"{kind}.batch.inline.loss_inputs",
        )
    _check_vocabulary(given["target_tokens"], f"{kind}.batch.inline.target_tokens", model)
    if "weights" in given:
        _check_weights(given["weights"], operation, kind)


def _check_weights(
    weights: Array, operation: training.Forward | training.ForwardBackward, kind: str
) -> None:
    field = f"{kind}.batch.inline.weights"
    if not np.isfinite(weights).all():
        raise TenSafeFault("INVALID_BATCH", "weights must be finite", field=field)
    if operation.loss.reduction == training.LOSS_REDUCTION_SUM:
        return
    if weights.min(initial=0.0) < 0:
        raise TenSafeFault(
            "INVALID_BATCH",
            "negative weights have no weighted mean; use the reduction `sum`",
            field=field,
        )
    if weights.sum(dtype=np.float64) == 0:
        raise TenSafeFault(
            "NOTHING_SCORED",
            "every weight is 0, so that there is no loss (labels all -100?); score at least one "
            "token",
            field=field,
        )


def _check_sample(sample: training.Sample, model: Model) -> float:
    wanted = sample.params.max_tokens if sample.params.HasField("max_tokens") else 128
    cost = 0.0
    for index, prompt in enumerate(sample.prompts):
        length = 16
        if prompt.WhichOneof("content") == "tokens":
            field = f"sample.prompts[{index}].tokens"
            tokens = _checked(lambda p=prompt: decode(p.tokens), field)  # type: ignore[misc]
            if tokens.ndim != 1 or tokens.dtype != np.dtype("<i4") or not len(tokens):
                raise TenSafeFault(
                    "INVALID_BATCH", "must be an int32 vector with at least one token", field=field
                )
            _check_vocabulary(tokens, field, model)
            length = len(tokens)
            if model.context_length and length >= model.context_length:
                raise TenSafeFault(
                    "CONTEXT_EXCEEDED",
                    f"prompt {index} has {length} tokens, the context of {model.name} is "
                    f"{model.context_length}: nothing can follow it; cut it",
                    field=field,
                )
        cost += length + wanted
    count = sample.params.num_samples if sample.params.HasField("num_samples") else 1
    return cost * count


def _checked(read: Callable[[], Array], field: str) -> Array:
    try:
        return read()
    except TensorError as error:
        raise TenSafeFault("INVALID_BATCH", str(error), field=field) from error


def _offsets(batch: training.Batch) -> Array:
    offsets = decode(batch.offsets)
    if offsets.dtype != np.dtype("<i8") or offsets.ndim != 1:
        raise TensorError("must be an int64 vector")
    if len(offsets) < 2:
        raise TensorError("the batch is empty; send at least one datum")
    if offsets[0] != 0 or (np.diff(offsets) <= 0).any():
        raise TensorError("must begin at 0 and increase strictly: every datum has a token")
    return offsets


def _tokens(batch: training.Batch, total: int) -> Array:
    tokens = decode(batch.input_tokens)
    if tokens.dtype != np.dtype("<i4") or tokens.ndim != 1:
        raise TensorError("must be an int32 vector")
    if len(tokens) != total:
        raise TensorError(f"has {len(tokens)} tokens, the offsets end at {total}")
    return tokens


def _per_token(item: NamedTensor, field: str, total: int) -> Array:
    values = _checked(lambda: decode(item.tensor), field)
    expected = np.dtype("<f4") if item.name == "weights" else np.dtype("<i4")
    if values.dtype != expected or values.shape != (total,) or item.HasField("offsets"):
        raise TenSafeFault(
            "INVALID_BATCH",
            f"{item.name} must be {expected.name} [{total}], one for each input token, without "
            f"offsets of its own; it is {values.dtype.name} {list(values.shape)}",
            field=field,
        )
    return values


def _check_vocabulary(tokens: Array, field: str, model: Model) -> None:
    if not model.vocabulary_size:
        return
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.vocabulary_size:
        bad = int(np.flatnonzero((tokens < 0) | (tokens >= model.vocabulary_size))[0])
        raise TenSafeFault(
            "TOKEN_OUT_OF_RANGE",
            f"token {int(tokens[bad])} at position {bad} is outside the vocabulary of "
            f"{model.name}, 0 to {model.vocabulary_size - 1}; was another tokenizer used?",
            field=field,
            position=bad,
            vocabulary_size=model.vocabulary_size,
        )
