"""The mock backend: the service without a model, for tests, benchmarks and first steps.

Step k's loss is 2.5 − 0.01·k, floored at 0.1; grad_norm lies in [1.500, 1.599]. It keeps the
accumulation window's rules and counts steps as the torch backend does, and trains nothing. Of the
losses it has `cross_entropy`, and `linear` for losses that clients compute. It takes private runs,
tells as little of them as the torch backend, and adds no noise, which each release says.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tensafe.wire.loss_tensors import check_tensors, is_scored
from tensafe.wire.losses import LossCard, Reduction
from tensafe.wire.status import TenSafeFault
from workers.backend import Backend
from workers.losses import LossRegistry
from workers.losses.cross_entropy import cross_entropy
from workers.losses.linear import linear
from workers.mock_sampler import MockSampler, mock_completions
from workers.operations import (
    Combine,
    LoadOutcome,
    LossOutcome,
    LossRequest,
    Metric,
    ModelCard,
    Output,
    PrivateRelease,
    RunSettings,
    SampleOutcome,
    SampleRequest,
    SaveOutcome,
    StepOutcome,
    StepRequest,
)
from workers.releases import (
    check_charged,
    check_forward,
    private_request,
    released_call,
    released_update,
)
from workers.window import Window, loss_metric

STATE_FILE = "state.json"
_FORMAT = "tensafe-mock-1"
_LOSSES = LossRegistry([cross_entropy, linear])


@dataclass(slots=True)
class _Run:
    settings: RunSettings
    window: Window
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class MockCaptured:
    """A run's state at one moment."""

    step: int
    state: str

    def write(self, directory: Path) -> None:
        """Writes `state.json`."""
        (directory / STATE_FILE).write_text(self.state)


def mock_loss(step: int) -> float:
    """Loss of the update that makes `step` (from 1): 2.490, 2.480, … down to 0.1."""
    return max(0.1, 2.5 - 0.01 * step)


def mock_grad_norm(seed: int, seq: int) -> float:
    """One of 1.500, 1.501, … 1.599, fixed by the run's seed and the operation."""
    digest = hashlib.blake2b(b"%d/%d" % (seed, seq), digest_size=8).digest()
    return 1.5 + int.from_bytes(digest, "little") % 100 / 1000


class MockBackend(Backend):
    """See the module. Serves any `model_ref`."""

    name = "mock"
    device = "cpu"
    credits = 1024
    instant = True

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        self._sampler = MockSampler(self._sample)

    def models(self) -> Sequence[ModelCard]:
        return [ModelCard(name="mock", architecture="mock", accepts_any_reference=True)]

    def losses(self) -> Sequence[LossCard]:
        return _LOSSES.cards()

    def fingerprint(self) -> dict[str, str]:
        return {"backend": "mock", "python": platform.python_version()}

    def open_run(self, run_id: str, settings: RunSettings, state: Path | None) -> None:
        closes_empty = settings.privacy is not None
        window = Window(settings.accumulation_steps, settings.max_steps, closes_empty)
        run = _Run(settings, window)
        if state is not None:
            _restore(run, _read(state))
        self._runs[run_id] = run

    def close_run(self, run_id: str) -> None:
        self._runs.pop(run_id, None)

    def poison(self, run_id: str) -> None:
        self._runs[run_id].window.poison()

    def drop_window(self, run_id: str) -> None:
        run = self._runs[run_id]
        run.window.clear()
        run.norms.clear()

    def forward(self, run_id: str, request: LossRequest) -> LossOutcome:
        run = self._runs[run_id]
        check_forward(run.settings.privacy)
        tokens = len(request.batch.input_tokens)
        return _loss(run, request, _reduction(request), tokens)[0]

    def forward_backward(self, run_id: str, seq: int, request: LossRequest) -> LossOutcome:
        run = self._runs[run_id]
        window = run.window
        tokens = len(request.batch.input_tokens)
        try:
            if run.settings.privacy is not None:
                request = private_request(request)
            reduction = _reduction(request)
            window.admit(reduction)
            outcome, loss_sum, scored = _loss(run, request, reduction, tokens)
        except BaseException:
            window.poison()
            raise
        norm = mock_grad_norm(run.settings.seed, seq)
        outcome.metrics.append(Metric("grad_norm", norm, Combine.LAST))
        run.norms.append(norm)
        window.add(
            reduction,
            loss_sum=loss_sum,
            denominator=scored,
            tokens=tokens,
            compute_ms=0.0,
        )
        return released_call(run.settings.privacy, outcome)

    def optim_step(self, run_id: str, request: StepRequest) -> StepOutcome:
        run = self._runs[run_id]
        rate = request.learning_rate
        if rate is None:
            rate = run.settings.optimizer.learning_rate
        try:
            check_charged(run.settings.privacy, run.window, request)
            closed = run.window.call(closes=request.closes)
        except TenSafeFault:
            if not run.window.is_open:
                run.norms.clear()
            raise
        if closed is None:
            return StepOutcome(run.window.step, False, rate)
        privacy = run.settings.privacy
        release = PrivateRelease(noise_applied=False) if privacy is not None else None
        norm = run.norms[-1] if run.norms else 0.0
        run.norms.clear()
        metrics = released_update(privacy, closed.metrics(norm, rate, 0.0))
        return StepOutcome(run.window.applied(), True, rate, norm, metrics, release)

    @property
    def sampler(self) -> MockSampler:
        return self._sampler

    def _sample(self, request: SampleRequest) -> SampleOutcome:
        if request.artifact is not None:
            step = int(_read(request.artifact.directory)["window"]["step"])
        elif request.run_id is not None:
            step = self._runs[request.run_id].window.step
        else:
            step = 0
        return SampleOutcome(mock_completions(request, step), step)

    def save_state(self, run_id: str, directory: Path, include_optimizer: bool) -> SaveOutcome:
        run = self._runs[run_id]
        _capture(run, include_optimizer).write(directory)
        return SaveOutcome(run.window.step, run.settings.model_ref)

    def capture(self, run_id: str) -> MockCaptured:
        return _capture(self._runs[run_id], True)

    def load_state(
        self, run_id: str, directory: Path, include_optimizer: bool | None
    ) -> LoadOutcome:
        run, state = self._runs[run_id], _read(directory)
        complete = bool(state["complete"])
        if include_optimizer and not complete:
            raise TenSafeFault(
                "ARTIFACT_MISMATCH",
                "the artifact was saved without optimizer state; load it with "
                "include_optimizer=False",
                field="load_state.include_optimizer",
            )
        restore = complete if include_optimizer is None else include_optimizer
        if restore:
            _restore(run, state)
        else:
            self.drop_window(run_id)
        return LoadOutcome(run.window.step, restore)


def _capture(run: _Run, complete: bool) -> MockCaptured:
    state = {
        "format": _FORMAT,
        "complete": complete,
        "window": run.window.as_json(),
        "grad_norms": run.norms,
        "run": run.settings.as_json(),
    }
    return MockCaptured(run.window.step, json.dumps(state, indent=1) + "\n")


def _reduction(request: LossRequest) -> Reduction:
    """Checks what the request says of its loss, as a backend that computes it would."""
    card = _LOSSES.find(request.loss).card
    options = card.resolve_options(request.options, "loss.options")
    source = None if request.reference is None else request.reference.source
    card.needs_reference(source, options, request.batch.tensors(), "loss.reference")
    return card.resolve_reduction(request.reduction, "loss.reduction")


def _loss(
    run: _Run, request: LossRequest, reduction: Reduction, tokens: int
) -> tuple[LossOutcome, float, float]:
    card = _LOSSES.find(request.loss).card
    batch = request.batch
    tensors = batch.tensors()
    card.check_inputs(list(tensors), "batch")
    check_tensors(card, tensors, batch.offsets, reduction, lambda name: f"batch.{name}")
    count = len(batch.input_tokens)
    weights = np.ones(count, np.float32) if batch.weights is None else batch.weights
    scored = int(np.count_nonzero(is_scored(weights)))
    denominator = 1.0
    if reduction is Reduction.TOKEN_MEAN:
        denominator = float(np.add.reduce(weights, axis=None, dtype=np.float64))
    elif reduction is Reduction.SEQUENCE_MEAN:
        denominator = float(len(batch.offsets) - 1)
    loss = mock_loss(run.window.step + 1)
    loss_sum = loss * (scored if reduction is Reduction.SUM else denominator)
    metric = loss_metric(reduction, loss_sum, denominator)
    if reduction is not Reduction.SUM:
        metric.value = loss  # exactly: the page prints it
    metrics = [
        metric,
        Metric("tokens", tokens, Combine.SUM),
        Metric("scored_tokens", scored, Combine.SUM),
    ]
    outcome = LossOutcome(metrics, {"logprobs": Output(np.zeros(weights.shape, np.float32))})
    return outcome, loss_sum, denominator


def _read(directory: Path) -> dict[str, Any]:
    if (directory / "adapter_config.json").is_file():  # an adapter that was uploaded
        return {"complete": False, "window": {"step": 0}}
    path = directory / STATE_FILE
    state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if state.get("format") != _FORMAT:
        raise TenSafeFault(
            "ARTIFACT_MISMATCH",
            "the artifact was not saved by the mock backend; load it where it was made",
            field="artifact_id",
        )
    return state


def _restore(run: _Run, state: dict[str, Any]) -> None:
    run.window.restore(state["window"])
    run.norms = [float(norm) for norm in state["grad_norms"]]
