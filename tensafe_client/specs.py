"""From the arguments of a call to the wire's OperationSpec."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration

from tensafe.v1 import losses_pb2
from tensafe.v1 import training_pb2 as pb
from tensafe.wire.loss_messages import reduction_number
from tensafe.wire.losses import Reduction
from tensafe_client.checks import check_bool, check_number, check_string
from tensafe_client.data.batches import EncodedBatch
from tensafe_client.errors import ConfigError, InvalidArgumentError

_MAX_METADATA_DEPTH = 16
_LONGEST_DEADLINE_S = 30 * 24 * 3600
_LONGEST_TTL_S = 100 * 365 * 86400.0
_REDUCTIONS = {str(name): reduction_number(name) for name in Reduction}
_REFERENCE = "reference"


def loss_config(
    loss_fn: str, options: Mapping[str, Any] | None, reduction: str | None
) -> losses_pb2.LossConfig:
    """Packs the loss; what is None stays unset.

    Raises:
        InvalidArgumentError: for an option that is no number, text or truth value.
    """
    if reduction is not None and check_string("reduction", reduction) not in _REDUCTIONS:
        raise InvalidArgumentError.of(
            "reduction", f"must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}"
        )
    message = losses_pb2.LossConfig(name=check_string("loss_fn", loss_fn))
    if reduction is not None:
        message.reduction = _REDUCTIONS[reduction]
    if options is None:
        return message
    if not isinstance(options, Mapping):
        raise InvalidArgumentError.of("loss_config", f"must be a dict, got {options!r}")
    for name, value in options.items():
        field = f"loss_config.{check_string('loss_config', name)}"
        if name == _REFERENCE:
            _set_reference(message.reference, check_string(field, value))
        elif isinstance(value, bool):
            message.options.fields[name].bool_value = value
        elif isinstance(value, str):
            message.options.fields[name].string_value = check_string(field, value)
        elif isinstance(value, numbers.Real):
            message.options.fields[name].number_value = check_number(field, value)
        else:
            raise InvalidArgumentError.of(
                field, f"must be a number, a string or a bool, got {value!r}"
            )
    return message


def _set_reference(message: losses_pb2.LossReference, value: str) -> None:
    if value == "base":
        message.base = True
    elif value == "none":
        message.none = True
    else:
        message.artifact_id = value


def set_deadline(spec: pb.OperationSpec, deadline_s: float | None) -> None:
    """Says how long the operation may wait, seconds; None leaves it open.

    Raises:
        InvalidArgumentError: if it is not above 0, or longer than 30 days.
    """
    if deadline_s is None:
        return
    seconds = check_number("deadline_s", deadline_s)
    if not 0 < seconds <= _LONGEST_DEADLINE_S:
        raise InvalidArgumentError.of(
            "deadline_s",
            f"must be above 0 and at most {_LONGEST_DEADLINE_S:,} (30 days), got {deadline_s}",
        )
    spec.time_to_live.FromNanoseconds(max(1, round(seconds * 1e9)))


def forward(run_id: str, batch: EncodedBatch, loss: losses_pb2.LossConfig) -> pb.OperationSpec:
    """Packs a forward pass."""
    spec = pb.OperationSpec(run_id=run_id)
    spec.forward.batch.inline.CopyFrom(batch.message)
    spec.forward.loss.CopyFrom(loss)
    return spec


def forward_backward(
    run_id: str, batch: EncodedBatch, loss: losses_pb2.LossConfig
) -> pb.OperationSpec:
    """Packs a forward and backward pass."""
    spec = pb.OperationSpec(run_id=run_id)
    spec.forward_backward.batch.inline.CopyFrom(batch.message)
    spec.forward_backward.loss.CopyFrom(loss)
    return spec


def refused_forward_backward(run_id: str) -> pb.OperationSpec:
    """Packs the place of a forward_backward that this side has refused: it has no batch."""
    return pb.OperationSpec(run_id=run_id, forward_backward=pb.ForwardBackward())


def optim_step(run_id: str, **options: float | None) -> pb.OperationSpec:
    """Packs an optimizer step; an option that is None stays unset."""
    given = {
        name: check_number(name, value) for name, value in options.items() if value is not None
    }
    return pb.OperationSpec(run_id=run_id, optim_step=pb.OptimStep(**given))


def private_step(run_id: str, **options: float | None) -> pb.OperationSpec:
    """Packs a whole private step; an option that is None stays unset."""
    given = {
        name: check_number(name, value) for name, value in options.items() if value is not None
    }
    return pb.OperationSpec(run_id=run_id, private_step=pb.PrivateStep(**given))


def save_state(
    run_id: str,
    metadata: Mapping[str, Any] | None,
    include_optimizer: bool | None,
    ttl_s: float | None,
) -> pb.OperationSpec:
    """Packs a checkpoint.

    Raises:
        InvalidArgumentError: if the metadata is no JSON object, or the time to live is too short.
    """
    message = pb.SaveState(include_optimizer=_flag(include_optimizer))
    if metadata is not None:
        message.metadata.CopyFrom(json_object(metadata))
    if ttl_s is not None:
        message.ttl.CopyFrom(time_to_live(ttl_s))
    return pb.OperationSpec(run_id=run_id, save_state=message)


def load_state(run_id: str, artifact_id: str, include_optimizer: bool | None) -> pb.OperationSpec:
    """Packs a restore."""
    message = pb.LoadState(
        artifact_id=check_string("artifact_id", artifact_id),
        include_optimizer=_flag(include_optimizer),
    )
    return pb.OperationSpec(run_id=run_id, load_state=message)


def _flag(include_optimizer: object) -> bool | None:
    return None if include_optimizer is None else check_bool("include_optimizer", include_optimizer)


def time_to_live(ttl_s: float) -> Duration:
    """Packs a time to live, seconds.

    Raises:
        InvalidArgumentError: below one second, or above a hundred years.
    """
    seconds = check_number("ttl_s", ttl_s)
    if not 1 <= seconds <= _LONGEST_TTL_S:
        raise InvalidArgumentError.of(
            "ttl_s",
            f"must be from 1 to {_LONGEST_TTL_S:.0f} seconds, got {ttl_s!r}",
            remedy="None keeps the artifact until it is deleted",
        )
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def json_object(metadata: Mapping[str, Any]) -> struct_pb2.Struct:
    if not isinstance(metadata, Mapping):
        raise InvalidArgumentError.of("metadata", f"must be a dict, got {type(metadata).__name__}")
    struct = struct_pb2.Struct()
    struct.update(_plain_json("metadata", metadata, 0))
    return struct


def _plain_json(path: str, value: Any, depth: int) -> Any:
    """Copies a JSON value into dicts and lists; `depth` counts the values around it."""
    if depth > _MAX_METADATA_DEPTH:
        raise InvalidArgumentError.of(
            "metadata",
            f"must be nested at most {_MAX_METADATA_DEPTH} levels deep",
            remedy="flatten it, or keep the deep part as a string: json.dumps(part)",
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_string(path, value)
    if isinstance(value, int | float):
        return _json_number(path, value)
    if isinstance(value, Mapping):
        return {
            check_string(f"key of {path}", key): _plain_json(f"{path}.{key}", item, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain_json(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    raise ConfigError.of(path, f"is of type {type(value).__name__}, which is no JSON value")


def _json_number(path: str, value: float) -> float:
    # A Struct holds binary64 numbers: no NaN, and no integer that would be rounded.
    exact = abs(value) <= 2**53 if isinstance(value, int) else math.isfinite(value)
    if not exact:
        raise ConfigError.of(
            path,
            f"is {value!r}, which JSON numbers cannot hold exactly",
            remedy="store it as a string",
        )
    return value
