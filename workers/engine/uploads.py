"""Arrays on their way to a device, without waiting for what it is at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def staged(array: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """The array as a tensor that a copy to the device need not wait for: a GPU takes memory that is
    not pinned only when it has done all that it was asked for before."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def upload(array: np.ndarray[Any, Any], device: torch.device | str) -> Tensor:
    """The array on a device; on a CPU the array itself."""
    return staged(array, device).to(device, non_blocking=True)
