"""From the arguments of a call to the wire's OperationSpec."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, cast

from google.protobuf import struct_pb2
from google.protobuf.duration_pb2 import Duration

from tensafe.v1 import losses_pb2
from tensafe.v1 import training_pb2 as pb
from tensafe.wire.loss_messages import reduction_number
from tensafe.wire.losses import Reduction
from tensafe.wire.tensors import encode
from tensafe_client.checks import check_bool, check_count, check_number, check_string
from tensafe_client.data.batches import EncodedBatch
from tensafe_client.data.datum import token_array
from tensafe_client.errors import BatchError, ConfigError, InvalidArgumentError

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


def sample(
    prompts: Any,
    weights: pb.SampleWeights,
    *,
    run_id: str | None = None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    seed: int | None,
    stop: Any,
    num_samples: int | None,
) -> pb.OperationSpec:
    """Packs text generation; an option that is None stays unset."""
    params = pb.SamplingParams()
    counts = {"max_tokens": max_tokens, "top_k": top_k, "num_samples": num_samples}
    numbers = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    for name, count in counts.items():
        if count is not None:
            setattr(params, name, check_count(name, count))
    for name, number in numbers.items():
        if number is not None:
            setattr(params, name, check_number(name, number))
    if seed is not None:
        params.seed = check_count("seed", seed, bits=64)
    if stop is not None:
        params.stop.CopyFrom(_stop(stop))
    message = pb.Sample(prompts=_prompts(prompts), params=params, weights=weights)
    return pb.OperationSpec(run_id=run_id, sample=message)


def run_weights(step: int | None, artifact: str | None) -> pb.SampleWeights:
    """Names the weights to sample a run from: current, as saved after a step, or an artifact's."""
    if step is not None and artifact is not None:
        raise InvalidArgumentError.of("artifact", "and step name the weights: pass one, not both")
    if step is not None:
        version = pb.PinnedVersion(step=check_count("step", step, bits=53))
        return pb.SampleWeights(version=version)
    if artifact is not None:
        return pb.SampleWeights(artifact_id=check_string("artifact", artifact))
    return pb.SampleWeights(current=pb.CurrentWeights())


def other_weights(base_model: str | None, artifact: str | None) -> pb.SampleWeights:
    """Names weights that belong to no run: a registered model's or an artifact's."""
    if (base_model is None) == (artifact is None):
        raise InvalidArgumentError.of(
            "base_model", "and artifact name the weights: pass one of them, and not both"
        )
    if base_model is not None:
        return pb.SampleWeights(base_model=check_string("base_model", base_model))
    return pb.SampleWeights(artifact_id=check_string("artifact", cast(str, artifact)))


def _prompts(prompts: Any) -> list[pb.Prompt]:
    """Takes one prompt or several; a prompt is text, token ids or a list of chat messages."""
    if isinstance(prompts, str) or not _is_list(prompts):
        return [_prompt(0, prompts)]
    if len(prompts) == 0:
        raise InvalidArgumentError.of("prompts", "is empty: pass at least one prompt")
    first = prompts[0]
    if isinstance(first, Mapping) or not (isinstance(first, str) or _is_list(first)):
        return [_prompt(0, prompts)]  # one conversation, or one list of token ids
    return [_prompt(index, prompt) for index, prompt in enumerate(prompts)]


def _prompt(index: int, prompt: Any) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=check_string(f"prompts[{index}]", prompt))
    if _is_list(prompt) and len(prompt) and isinstance(prompt[0], Mapping):
        return pb.Prompt(chat=pb.Chat(messages=[_message(index, item) for item in prompt]))
    if _is_list(prompt):
        try:
            return pb.Prompt(tokens=encode(token_array(f"prompts[{index}]", prompt)))
        except BatchError as error:
            raise InvalidArgumentError(error.message, violations=error.violations) from None
    raise InvalidArgumentError.of(
        f"prompts[{index}]",
        "must be text, a list of token ids or a list of chat messages, got "
        f"{type(prompt).__name__}",
    )


def _message(index: int, item: Any) -> pb.ChatMessage:
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise InvalidArgumentError.of(
            f"prompts[{index}]", f"must have messages with role and content only, got {item!r}"
        )
    return pb.ChatMessage(
        role=check_string("role", item["role"]), content=check_string("content", item["content"])
    )


def _stop(stop: Any) -> pb.Stop:
    items = [stop] if isinstance(stop, str | int) else stop
    message = pb.Stop()
    if not isinstance(items, Sequence):
        raise InvalidArgumentError.of("stop", f"must be texts or token ids, got {stop!r}")
    for item in items:
        if isinstance(item, str):
            message.strings.append(check_string("stop", item))
        else:
            message.tokens.append(check_count("stop", item, bits=31))
    return message


def _is_list(value: Any) -> bool:
    """A list, a tuple, a NumPy array or a tensor."""
    return not isinstance(value, str | bytes | Mapping) and hasattr(value, "__getitem__")


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
    raise ConfigError.of(path, f"is a {type(value).__name__}, which is no JSON value")


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
