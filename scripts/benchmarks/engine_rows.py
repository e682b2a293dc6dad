"""Batches of the engine's benchmarks, in both forms: ours and a Hugging Face loop's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.operations import Batch, LossRequest

MIXED = (48, 64, 96, 112, 128, 152, 184, 240)
"""Lengths of the mixed rows: 1,024 tokens, 1,920 when padded."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One batch.

    Attributes:
        ours: as the engine takes it.
        theirs: input_ids, attention_mask, labels [B, T], padded on the right to the longest.
        tokens: in the rows, without padding.
    """

    ours: LossRequest
    theirs: dict[str, Tensor]
    tokens: int


def make_rows(lengths: Sequence[int], masked: float, vocabulary: int, seed: int = 0) -> Rows:
    """Random rows; the first `masked` share of each row's tokens is a prompt, not scored."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    weights = []
    for index, row in enumerate(rows):
        length, prompt = len(row), int(len(row) * masked)
        ids[index, :length] = torch.from_numpy(row.astype(np.int64))
        mask[index, :length] = 1
        labels[index, prompt:length] = ids[index, prompt:length]
        # Position t predicts token t + 1.
        weights.append((np.arange(1, length) >= prompt).astype(np.float32))
    ours = Batch(
        offsets=np.cumsum([0, *(length - 1 for length in lengths)], dtype=np.int64),
        input_tokens=np.concatenate([row[:-1] for row in rows]),
        target_tokens=np.concatenate([row[1:] for row in rows]),
        weights=np.concatenate(weights),
    )
    theirs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Rows(LossRequest(ours), theirs, sum(lengths))
