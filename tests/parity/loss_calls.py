"""Calls of every loss on a tiny model, in our form and as NumPy's cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from parity.peft_reference import PlainPeft
from parity.tiny_runs import VOCABULARY, hf_batch, rows_of
from unit.workers.numpy_losses import Array, Case

from tensafe.wire.losses import Reduction
from workers.operations import Batch, LossRequest, Reference

LENGTHS = [5, 23, 9, 12, 1, 17]
LOSSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "cross_entropy": ("cross_entropy", {}, "sequence_mean"),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.2}, "token_mean"),
    "soft": ("cross_entropy", {"label_smoothing": 0.1}, "token_mean"),
    "importance_sampling": ("importance_sampling", {"entropy_coef": 0.1}, "token_mean"),
    "ppo": ("ppo", {"clip_high": 1.1, "kl_coef": 0.3}, "token_mean"),
    "ppo-both": ("ppo", {"entropy_coef": 0.2, "kl_coef": 0.3}, "sequence_mean"),
    "cispo": ("cispo", {"clip_high": 1.3}, "sum"),
    "dro": ("dro", {"beta": 0.5}, "token_mean"),
    "gspo": ("gspo", {"clip_low": 0.9, "clip_high": 1.1}, "sequence_mean"),
    "dpo": ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, "sequence_mean"),
    "dpo-given": ("dpo", {}, "sum"),
    "dpo-none": ("dpo", {"reference": "none"}, "sequence_mean"),
    "kl": ("kl", {}, "token_mean"),
    "kl-forward": ("kl", {"direction": "forward"}, "sequence_mean"),
    "linear": ("linear", {"value": 0.5}, "sum"),
}
COMPARING = [name for name, (loss, opts, _) in LOSSES.items() if loss == "kl" or "kl_coef" in opts]


def loss_request(
    key: str,
    seed: int = 3,
    reference: Reference | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> LossRequest:
    """A batch with unscored prompts, other weights than 1, and the loss's inputs."""
    name, options, reduction = LOSSES[key]
    rng = np.random.default_rng([seed, len(key)])
    rows = rows_of(seed, list(lengths))
    count = sum(lengths)
    targets = np.concatenate([row[1:] for row in rows])
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    weights = rng.choice([0.0, 0.5, 1.0, 1.0], count)
    weights[offsets[1:] - 1] = 1.0
    inputs: dict[str, Array] = {}
    if key == "soft":
        targets = rng.integers(3, VOCABULARY, (count, 3)).astype(np.int32)
        weights = weights[:, None] * rng.choice([0.0, 0.25, 0.5], (count, 3))
        weights[offsets[1:] - 1] = 0.25
    if name in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        # A random model's log-probabilities, so that some ratios lie beyond the clips.
        inputs["logprobs"] = rng.normal(-np.log(VOCABULARY), 0.3, count)
        inputs["advantages"] = rng.normal(size=count)
    if name == "linear":
        inputs["gradients"] = rng.normal(size=count)
    if key == "dpo-given":
        inputs["reference_logprobs"] = rng.normal(-np.log(VOCABULARY), 0.3, count)
    if "reference" in options:
        reference = Reference(options["reference"])
    batch = Batch(
        offsets,
        np.concatenate([row[:-1] for row in rows]),
        targets,
        weights.astype(np.float32),
        {name: values.astype(np.float32) for name, values in inputs.items()},
    )
    own = {name: value for name, value in options.items() if name != "reference"}
    return LossRequest(batch, name, Reduction(reduction), own, reference)


def plain_logits(plain: PlainPeft, seed: int = 3) -> torch.Tensor:
    """[N, V] of all positions, by plain `peft` on a padded batch."""
    batch = hf_batch(rows_of(seed, LENGTHS))
    logits = plain.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.cat([logits[row, :length] for row, length in enumerate(LENGTHS)])


def scored_case(request: LossRequest, logits: Array, reference: Array) -> tuple[Case, Array]:
    """NumPy's case of the scored positions, and bool [N]: which those are."""
    batch = request.batch
    mask = batch.weights != 0 if batch.weights.ndim == 1 else (batch.weights != 0).any(1)
    counts = np.add.reduceat(mask.astype(int), batch.offsets[:-1]).tolist()
    case = Case(
        logits=logits[mask],
        reference=reference[mask],
        lengths=counts,
        targets=batch.target_tokens[mask],
        weights=batch.weights[mask].astype(np.float64),
        inputs={name: values[mask].astype(np.float64) for name, values in batch.inputs.items()},
    )
    return case, mask
