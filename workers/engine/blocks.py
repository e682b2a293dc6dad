"""Activation checkpointing of a model's layers, switched per pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class Blocks:
    """A model's layers, as `transformers` marks them for checkpointing.

    Attributes:
        frugal: the next passes keep each layer's inputs only and compute the rest again in the
            backward pass. The numbers are the same, bit for bit.
    """

    def __init__(self, body: nn.Module) -> None:
        self.frugal = False
        for module in body.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # Its own switch works in training mode only, where dropouts of the base would too.
                module.forward = partial(self._forward, module.forward)

    def _forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not (self.frugal and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
