"""Gated layers are changed where they compute the known form, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.engine.gated import lean_gates


class Gated(nn.Module):
    def __init__(self, clamp: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.down_proj = nn.Linear(12, 8)
        self.act_fn = nn.SiLU()
        self.clamp = clamp

    def forward(self, inputs):
        gate, up = self.act_fn(self.gate_proj(inputs)), self.up_proj(inputs)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return self.down_proj(gate * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("clamp", "changed"), [(None, 1), (16.0, 0), (0.1, 0)])
@torch.no_grad()
def test_a_clamp_that_small_numbers_never_meet_is_seen(clamp, changed, dtype):
    layer = Gated(clamp).to(dtype)
    inputs = 30 * torch.randn(5, 8, dtype=dtype)
    before = layer(inputs)
    assert lean_gates(nn.ModuleList([layer])) == changed
    assert torch.equal(layer(inputs), before)
