"""What a private step cost, and what else of it may be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tensafe.v1 import privacy_pb2 as pb
from tensafe_client.given import present


@dataclass(frozen=True)
class DPMetrics:
    """Of an applied step of a private run.

    Attributes:
        noise_applied: whether noise was added.
        epsilon_spent: ε of the dataset's ledger with this step, less ε without it.
        total_epsilon: ε of all that the ledger has; infinite without noise.
        delta: δ at which ε is stated.
        num_clipped: units whose gradient was clipped; None unless the run has
            metrics="raw_to_owner".
        steps_left: steps that this run may still make, if no other run adds to the ledger; None
            without an end.
        epsilon_if_poisson: what total_epsilon would be if the batches had been drawn as was
            attested, which nobody has checked; None where that is not in question.
        sampling_verified: whether the server drew all that total_epsilon adds up itself: the
            batches of this run, and of all others in the ledger.
        noised_loss: the noised mean loss; None without loss_noise_multiplier.
    """

    noise_applied: bool
    epsilon_spent: float
    total_epsilon: float
    delta: float
    num_clipped: int | None
    steps_left: int | None
    epsilon_if_poisson: float | None
    sampling_verified: bool
    noised_loss: float | None

    @classmethod
    def from_proto(cls, message: pb.DpMetrics) -> DPMetrics:
        """Unpacks the message; an ε that it lacks is infinite."""
        optional = ("num_clipped", "steps_left", "epsilon_if_poisson", "noised_loss")
        values: dict[str, Any] = dict.fromkeys(optional)
        values |= {"epsilon_spent": math.inf, "total_epsilon": math.inf}
        values |= present(message, *values)
        return cls(
            noise_applied=message.noise_applied,
            delta=message.delta,
            sampling_verified=message.sampling_verified,
            **values,
        )
