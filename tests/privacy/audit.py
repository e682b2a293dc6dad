"""A paired white-box audit: does one canary move what is released by more than noise allows?

With and without the canary, many releases are projected on its gradient. Under the claim the two
means differ by C at most, in units of the noise's standard deviation σC: a Gaussian shift of 1/σ.
(Nasr et al. 2023, arXiv 2302.07956, audit DP-SGD with white-box access in this way.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from parity.tiny_runs import settings
from privacy.private_runs import SGD, private, private_request

from workers.engine.base_model import BaseModel
from workers.engine.engine import TorchBackend
from workers.operations import StepRequest

RELEASES = 20_000
ALARM = 4.0
"""Standard errors: a sound mechanism sounds a false alarm once in 30,000 audits."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What came of an audit.

    Attributes:
        shift: estimated distance of the means over the standard deviation.
        error: the estimate's own standard deviation.
        claimed: the largest distance that the settings allow, 1/σ.
    """

    shift: float
    error: float
    claimed: float

    @property
    def z(self) -> float:
        """By how many standard errors the shift exceeds the claim."""
        return (self.shift - self.claimed) / self.error

    @property
    def alarms(self) -> bool:
        """Whether the claim is refuted."""
        return self.z >= ALARM


def audit(
    base: BaseModel,
    canary: np.ndarray,
    *,
    sigma: float,
    bound: float,
    releases: int = RELEASES,
    calls: int = 1,
) -> Audit:
    """Audits steps of the engine: half of the releases are of a window with the canary alone, the
    others of an empty one. A window's sum is computed once, and noised anew for each release.

    Args:
        base: a model; small, for the sake of time.
        canary: its row.
        calls: forward_backwards of the window that have the canary, which are one unit.
    """
    request = private_request([canary])
    backend = TorchBackend([base], token_budget=1000)
    run = private(
        settings(optimizer=SGD, lora={"rank": 1, "target_modules": ("q_proj",)}),
        noise_multiplier=sigma,
        max_grad_norm=bound,
        expected_batch_size=1.0,
    )
    backend.open_run("run", run, None)
    summed = None
    for call in range(calls):
        # As the coordinator numbers them: a unit counts in one call of a window.
        request.batch.units = np.array([0 if call == 0 else -1], np.int32)
        backend.forward_backward("run", call, request)
        summed = backend._runs["run"].accumulator.clone()
    backend.drop_window("run")
    direction = summed.double() / summed.double().norm()
    found = [_projections(backend, window, direction, releases // 2) for window in (None, summed)]
    spread = math.sqrt(sum(part.var(ddof=1) for part in found) / 2)
    shift = (found[1].mean() - found[0].mean()) / spread
    # Of a difference of means in units of an estimated deviation.
    error = math.sqrt(4 / releases + shift**2 / (2 * releases))
    return Audit(float(shift), error, 1 / sigma)


def _projections(
    backend: TorchBackend, summed: torch.Tensor | None, direction: torch.Tensor, count: int
) -> np.ndarray:
    """[count]: of what each update moves the weights by, which are put back in between."""
    run = backend._runs["run"]
    before = run.adapter.weights.detach().clone()
    found = np.empty(count)
    for index in range(count):
        run.accumulator = None if summed is None else summed.clone()
        outcome = backend.optim_step("run", StepRequest(charged=True))
        assert outcome.applied
        with torch.no_grad():
            found[index] = float(((before - run.adapter.weights).double() * direction).sum())
            run.adapter.weights.copy_(before)
    return found
