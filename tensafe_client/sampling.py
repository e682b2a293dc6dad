"""What may be asked of a sample, and the wire's OperationSpec of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from tensafe.v1 import training_pb2 as pb
from tensafe.wire.tensors import encode
from tensafe_client.checks import check_bool, check_count, check_number, check_string
from tensafe_client.data.datum import token_array
from tensafe_client.errors import BatchError, InvalidArgumentError


class SamplingOptions(TypedDict, total=False):
    """How to choose tokens, and what to tell of them; see `TrainingClient.sample`."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: Any
    num_samples: int | None
    top_logprobs: int | None
    prompt_logprobs: bool | None


class _Waiting(SamplingOptions, total=False):
    deadline_s: float | None


class RunSampling(_Waiting, total=False):
    """The options of a run's `sample`."""

    step: int | None
    artifact: str | None


class OtherSampling(_Waiting, total=False):
    """The options of `sample` from weights of no run."""

    model: str | None
    artifact: str | None


_COUNTS = ("max_tokens", "top_k", "num_samples", "top_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p")


def sample(
    prompts: Any,
    weights: pb.SampleWeights,
    options: SamplingOptions,
    *,
    run_id: str | None = None,
    stream: bool = False,
) -> pb.OperationSpec:
    """Packs text generation; an option that is None stays unset.

    Raises:
        InvalidArgumentError: naming the argument that is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    params = pb.SamplingParams()
    for name in _COUNTS:
        if name in given:
            setattr(params, name, check_count(name, given[name]))
    for name in _NUMBERS:
        if name in given:
            setattr(params, name, check_number(name, given[name]))
    if "seed" in given:
        params.seed = check_count("seed", given["seed"], bits=64)
    if "prompt_logprobs" in given:
        params.prompt_logprobs = check_bool("prompt_logprobs", given["prompt_logprobs"])
    if "stop" in given:
        params.stop.CopyFrom(_stop(given["stop"]))
    message = pb.Sample(
        prompts=_prompts(prompts),
        params=params,
        weights=weights,
        stream=check_bool("stream", stream),
    )
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


def other_weights(model: str | None, artifact: str | None) -> pb.SampleWeights:
    """Names weights that belong to no run: a registered model's or an artifact's."""
    if (model is None) == (artifact is None):
        raise InvalidArgumentError.of(
            "model", "and artifact name the weights: pass one of them, and not both"
        )
    if model is not None:
        return pb.SampleWeights(base_model=check_string("model", model))
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
