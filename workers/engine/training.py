"""One run's training: forward passes, gradients, updates."""

# ruff: noqa: N806 - the suffixes give shapes
from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.engine.adapters import Adapter
from workers.engine.base_model import BaseModel
from workers.engine.batches import Pass, ScoredBatch, check_batch, split
from workers.engine.dropout import token_keys
from workers.engine.losses import target_logprobs
from workers.engine.memory import memory_faults
from workers.engine.optimizers import RunOptimizer
from workers.operations import (
    Combine,
    Float32,
    LossOutcome,
    LossRequest,
    Metric,
    Reduction,
    RunSettings,
    StepOutcome,
    StepRequest,
)
from workers.window import Window, loss_metric


@dataclass
class Run:
    """A run's whole state.

    Attributes:
        accumulator: float32 [P], the summed gradient of the open window; None while it is closed.
        seed: fixes dropout and sampling; the configuration's, or that of a loaded state.
        backwards: forward_backward calls that took effect, over the run's whole life. It counts
            the "logical operation" of the dropout masks, and travels with the state, so that a
            restored run goes on with the masks that it would have had.
    """

    run_id: str
    settings: RunSettings
    model: BaseModel
    adapter: Adapter
    optimizer: RunOptimizer
    window: Window
    seed: int
    accumulator: Tensor | None = None
    backwards: int = 0


def forward(run: Run, request: LossRequest, token_budget: int) -> LossOutcome:
    """Loss and log-probabilities without dropout; changes nothing."""
    batch = _checked(run, request)
    with memory_faults("forward"), torch.no_grad():
        run.model.adapters.activate(run.adapter)
        parts = [(part, *_loss(run.model, part)) for part in split(batch, token_budget)]
        loss_sum = float(torch.stack([loss for _, _, loss in parts]).double().sum())
        logprobs = _gather(batch, [(part, logprobs) for part, logprobs, _ in parts])
    _check_loss(loss_sum)
    return LossOutcome(_metrics(request, batch, loss_sum), logprobs)


def forward_backward(run: Run, request: LossRequest, token_budget: int) -> LossOutcome:
    """Adds the batch's summed gradient to the window; on any error, poisons the window."""
    begin = time.perf_counter()
    try:
        run.window.admit(request.reduction)
        batch = _checked(run, request)
        with memory_faults("forward_backward"):
            outcome, loss_sum = _backward(run, request, batch, token_budget)
    except BaseException:
        run.window.poison()
        raise
    run.backwards += 1
    run.window.add(
        request.reduction,
        loss_sum=loss_sum,
        denominator=batch.denominator,
        tokens=len(batch.tokens),
        compute_ms=(time.perf_counter() - begin) * 1e3,
    )
    return outcome


def _backward(
    run: Run, request: LossRequest, batch: ScoredBatch, token_budget: int
) -> tuple[LossOutcome, float]:
    run.model.adapters.activate(run.adapter)
    # This call's own gradient, apart from what the window holds: its norm is asked for, and a
    # failure half-way leaves the window's sum as it was.
    gradient = run.adapter.gradient()
    gradient.zero_()
    losses, logprobs = [], []
    for part in split(batch, token_budget):
        with _dropout(run, part):
            part_logprobs, loss = _loss(run.model, part)
            loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        logprobs.append((part, part_logprobs.detach()))
    # One transfer from the device for both numbers.
    sums = torch.stack([torch.stack(losses).double().sum(), _norm(gradient).double()])
    loss_sum, norm = (float(number) for number in sums.tolist())
    _check_loss(loss_sum)
    outcome = LossOutcome(_metrics(request, batch, loss_sum), _gather(batch, logprobs))
    divisor = batch.denominator if request.reduction is Reduction.WEIGHTED_MEAN else 1.0
    outcome.metrics.append(Metric("grad_norm", norm / divisor, Combine.LAST))
    if run.accumulator is None:
        run.accumulator = gradient.clone()
    else:
        run.accumulator += gradient
    return outcome, loss_sum


def optim_step(run: Run, request: StepRequest) -> StepOutcome:
    """Counts a call; the one that closes the window divides, clips and applies.

    Raises:
        TenSafeFault: MAX_STEPS_REACHED, WINDOW_POISONED, EMPTY_WINDOW, NON_FINITE_GRADIENT.
    """
    begin = time.perf_counter()
    own = run.settings.optimizer
    rate = own.learning_rate if request.learning_rate is None else request.learning_rate
    decay = own.weight_decay if request.weight_decay is None else request.weight_decay
    clip = own.grad_clip_norm if request.grad_clip_norm is None else request.grad_clip_norm
    _check_finite(rate, decay, clip)
    try:
        closed = run.window.call()
    except TenSafeFault:
        if not run.window.is_open:
            run.accumulator = None
        raise
    if closed is None:
        return StepOutcome(run.window.step, False, rate)
    gradient, run.accumulator = run.accumulator, None
    if gradient is None:
        raise RuntimeError("a window that holds a gradient has no accumulator")
    with memory_faults("optim_step"), torch.no_grad():
        gradient /= closed.divisor
        norm = float(_norm(gradient))
        if not math.isfinite(norm):
            raise TenSafeFault(
                "NON_FINITE_GRADIENT",
                "the window's gradient is NaN or infinite; nothing was applied and the window is "
                "closed; lower the learning rate or the weights, or load an earlier state",
            )
        if clip is not None and norm > clip:
            gradient *= clip / norm
        if not run.optimizer.step(gradient, rate, decay):
            raise TenSafeFault(
                "NON_FINITE_GRADIENT",
                "the update made the weights or the optimizer's state NaN or infinite; nothing was "
                "applied and the window is closed; lower the learning rate, or raise eps",
            )
    metrics = closed.metrics(norm, rate, (time.perf_counter() - begin) * 1e3)
    return StepOutcome(run.window.applied(), True, rate, norm, metrics)


def _loss(model: BaseModel, part: Pass) -> tuple[Tensor, Tensor]:
    """Log-probabilities [S] and Σ −w·logprob of one pass."""
    hidden = model.hidden(_to(part.input_ids, model.device))
    scored_SD = hidden.flatten(0, 1).index_select(0, _to(part.positions, model.device))
    targets = _to(part.targets, model.device)
    logprobs = target_logprobs(scored_SD, model.head.weight, model.head.bias, targets)
    return logprobs, -torch.dot(logprobs, _to(part.weights, model.device))


@contextmanager
def _dropout(run: Run, part: Pass) -> Iterator[None]:
    if not run.adapter.settings.dropout:
        yield
        return
    rows = _to(part.rows, run.model.device)
    length = part.input_ids.shape[1]
    run.model.scope.token_keys = token_keys(run.seed, run.backwards, rows, length)
    try:
        yield
    finally:
        run.model.scope.token_keys = None


def _gather(batch: ScoredBatch, parts: list[tuple[Pass, Tensor]]) -> Float32:
    """float32 [N] in the batch's order, 0 where nothing is scored."""
    logprobs = np.zeros(len(batch.tokens), np.float32)
    sources = np.concatenate([part.sources for part, _ in parts])
    logprobs[sources] = torch.cat([values for _, values in parts]).cpu().numpy()
    return logprobs


def _to(array: NDArray[Any], device: str) -> Tensor:
    # NumPy may hand out read-only memory, of which torch warns; these arrays are our own copies.
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _norm(vector: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vector)
    return norm


def _checked(run: Run, request: LossRequest) -> ScoredBatch:
    if request.loss != "cross_entropy":
        raise TenSafeFault(
            "UNSUPPORTED_OPTION",
            f"there is no loss {request.loss!r}; use cross_entropy",
            field="loss.name",
        )
    return check_batch(request, run.model.vocabulary_size, run.model.context_length)


def _check_loss(loss_sum: float) -> None:
    if not math.isfinite(loss_sum):
        raise TenSafeFault(
            "NON_FINITE_LOSS",
            "the loss is NaN or infinite and the call added no gradient; lower the learning rate "
            "or the weights, or load an earlier state",
        )


def _check_finite(rate: float, decay: float, clip: float | None) -> None:
    for name, value, least in (
        ("learning_rate", rate, 0.0),
        ("weight_decay", decay, 0.0),
        ("grad_clip_norm", 1.0 if clip is None else clip, 1e-300),
    ):
        if not math.isfinite(value) or value < least:
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"{name} is {value}; it must be finite and not negative (grad_clip_norm above 0)",
                field=f"optim_step.{name}",
            )


def _metrics(request: LossRequest, batch: ScoredBatch, loss_sum: float) -> list[Metric]:
    return [
        loss_metric(request.reduction, loss_sum, batch.denominator),
        Metric("tokens", len(batch.tokens), Combine.SUM),
        Metric("scored_tokens", batch.scored, Combine.SUM),
    ]
