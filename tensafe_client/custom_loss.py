"""A loss of the caller's own: computed here from log-probabilities, trained there by its gradient.

Nothing of the function leaves this process. The service gives the log-probabilities of a forward
pass with the dropout masks that its next backward pass will have; the function gives a loss and
its gradient by them; the service's loss `linear` takes these through the model. By the chain rule
that is the loss's own gradient, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import numpy as np

from tensafe.v1 import losses_pb2
from tensafe.v1 import training_pb2 as pb
from tensafe.v1.types_pb2 import DATA_TYPE_FLOAT32
from tensafe.wire.tensors import Array
from tensafe_client.checks import check_number
from tensafe_client.data.batches import EncodedBatch
from tensafe_client.data.datum import to_numpy
from tensafe_client.errors import ConfigError, InvalidArgumentError
from tensafe_client.results import ForwardBackwardResult

LossFunction = Callable[["Logprobs"], Any]
_TAGS_BYTES = 64
_OF_THE_SERVICE = frozenset({"loss", "grad_norm", "tokens", "scored_tokens"})


class Logprobs(Sequence[Array]):
    """Log-probabilities of a batch's targets: for each datum float32 [T_b], 0 where not scored.

    For soft targets [T_b, K]. With `torch()` the same as tensors to differentiate by.
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = list(arrays)
        self._leaves: list[Any] | None = None

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        return self._arrays[index]

    def __len__(self) -> int:
        return len(self._arrays)

    def torch(self) -> list[Any]:
        """For each datum a tensor that requires a gradient; imports torch.

        Raises:
            ConfigError: if torch is not installed here.
        """
        if self._leaves is None:
            try:
                import torch
            except ImportError as error:
                raise ConfigError.of(
                    "fn",
                    "wants torch, which is not installed here",
                    remedy="install torch, or return the loss and its gradients from NumPy",
                ) from error
            self._leaves = [
                torch.from_numpy(array.copy()).requires_grad_() for array in self._arrays
            ]
        return self._leaves

    @property
    def leaves(self) -> list[Any] | None:
        """What `torch()` gave; None if it was not called."""
        return self._leaves


@dataclass(frozen=True, eq=False)
class LossValue:
    """What a loss function gave: the loss, ∂ loss / ∂ logprob of each datum, its own metrics."""

    loss: float
    gradients: list[Array]
    metrics: Mapping[str, float]

    def shown_in(self, result: ForwardBackwardResult) -> ForwardBackwardResult:
        """The result of the backward pass, with this loss and these metrics."""
        metrics = {**result.metrics, "loss": self.loss, **self.metrics}
        return replace(result, loss=self.loss, metrics=metrics)


def evaluate(fn: LossFunction, logprobs: Logprobs) -> LossValue | BaseException:
    """Calls a loss function.

    Returns:
        What it gave; or what it raised, which is its caller's to see, whatever it is;
        InvalidArgumentError if it did not give what it must.
    """
    try:
        return _evaluate(fn, logprobs)
    except BaseException as error:
        return error


def _evaluate(fn: LossFunction, logprobs: Logprobs) -> LossValue:
    given = fn(logprobs)
    parts = given if isinstance(given, tuple) else (given,)
    if logprobs.leaves is None:
        return _from_numpy(parts, logprobs)
    return _from_torch(parts, logprobs.leaves)


def _from_numpy(parts: tuple[Any, ...], logprobs: Logprobs) -> LossValue:
    if len(parts) not in (2, 3):
        raise InvalidArgumentError.of(
            "fn",
            "must return (loss, gradients) or (loss, gradients, metrics), with a gradient for "
            f"each datum; or take tensors from its argument's torch(); got {parts[0]!r}",
        )
    gradients = [to_numpy("fn", gradient) for gradient in parts[1]]
    if len(gradients) != len(logprobs):
        raise InvalidArgumentError.of(
            "fn", f"returned {len(gradients)} gradients for {len(logprobs)} datums"
        )
    for index, (gradient, logprob) in enumerate(zip(gradients, logprobs, strict=True)):
        if gradient.shape != logprob.shape or gradient.dtype.kind not in "biuf":
            raise InvalidArgumentError.of(
                "fn",
                f"returned a gradient of datum {index} with shape {list(gradient.shape)} of "
                f"{gradient.dtype}; it must have {list(logprob.shape)} numbers",
            )
    return _checked(parts[0], gradients, parts[2] if len(parts) > 2 else {})


def _from_torch(parts: tuple[Any, ...], leaves: list[Any]) -> LossValue:
    import torch

    loss = parts[0]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or len(parts) > 2:
        raise InvalidArgumentError.of(
            "fn", f"must return a loss of one element, or (loss, metrics); got {parts!r}"
        )
    if not loss.requires_grad:
        raise InvalidArgumentError.of("fn", "returned a loss that depends on no log-probability")
    gradients = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    arrays = [
        np.zeros(tuple(leaf.shape), np.float32) if gradient is None else gradient.numpy()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    return _checked(loss.item(), arrays, parts[1] if len(parts) > 1 else {})


def _checked(loss: Any, gradients: list[Array], metrics: Any) -> LossValue:
    value = check_number("fn's loss", loss.item() if hasattr(loss, "item") else loss)
    if not math.isfinite(value):
        raise InvalidArgumentError.of("fn", f"returned a loss of {value}; it must be finite")
    with np.errstate(over="ignore"):  # infinity is refused below
        narrow = [gradient.astype(np.float32) for gradient in gradients]
    for index, gradient in enumerate(narrow):
        if not np.isfinite(gradient).all():
            raise InvalidArgumentError.of(
                "fn", f"returned a gradient of datum {index} that is NaN or infinite"
            )
    if not isinstance(metrics, Mapping):
        raise InvalidArgumentError.of("fn", f"returned metrics that are no dict: {metrics!r}")
    for name in metrics:
        if str(name) in _OF_THE_SERVICE:
            raise InvalidArgumentError.of(
                "fn", f"returned a metric named {name!r}, which the service reports; rename it"
            )
    numbers = {
        str(name): check_number(f"fn's metric {name}", one.item() if hasattr(one, "item") else one)
        for name, one in metrics.items()
    }
    return LossValue(value, narrow, numbers)


class CustomBatch:
    """A batch of a custom loss: what both passes send of it.

    Its weights only say which targets are scored; what they count is the function's own business.
    """

    def __init__(self, batch: EncodedBatch) -> None:
        self.offsets = batch.offsets
        self._message = pb.Batch(
            offsets=batch.message.offsets, input_tokens=batch.message.input_tokens
        )
        named = {item.name: item for item in batch.message.loss_inputs}
        self._message.loss_inputs.add().CopyFrom(named["target_tokens"])
        weights = named["weights"].tensor
        mask = np.frombuffer(weights.data, "<f4") != 0
        self._scored = int(np.count_nonzero(mask))
        scored = self._message.loss_inputs.add(name="weights").tensor
        scored.CopyFrom(weights)
        scored.data = mask.astype("<f4").tobytes()
        self._shape = weights.shape

    @property
    def backward_bytes(self) -> int:
        """About how large the backward pass's message will be."""
        return self._message.ByteSize() + 4 * math.prod(self._shape) + _TAGS_BYTES

    def forward(self, run_id: str) -> pb.OperationSpec:
        """The forward pass, with the masks of the backward pass."""
        spec = pb.OperationSpec(run_id=run_id)
        spec.forward.batch.inline.CopyFrom(self._message)
        spec.forward.loss.name = "cross_entropy"
        spec.forward.dropout = True
        return spec

    def backward(self, run_id: str, value: LossValue) -> pb.OperationSpec:
        """The backward pass of a loss."""
        spec = pb.OperationSpec(run_id=run_id)
        message = spec.forward_backward
        message.batch.inline.CopyFrom(self._message)
        gradients = message.batch.inline.loss_inputs.add(name="gradients").tensor
        gradients.dtype = cast("Any", DATA_TYPE_FLOAT32)
        gradients.shape.extend(self._shape)
        gradients.data = np.concatenate(value.gradients).astype("<f4").tobytes()
        message.loss.name = "linear"
        message.loss.reduction = losses_pb2.LOSS_REDUCTION_SUM
        if self._scored:
            message.loss.options.fields["value"].number_value = value.loss / self._scored
        return spec
