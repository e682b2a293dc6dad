"""Under dropout the engine equals plain `peft` with the same masks, to 1e-9 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity.peft_reference import PlainPeft
from parity.tiny_models import FAMILIES, Family, Wide
from parity.tiny_runs import metric, perturb, request_of, rows_of, settings
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from workers.engine.base_model import freeze
from workers.engine.batched_products import PaddedBmm
from workers.engine.dropout import (
    kept_share,
    last_dropped,
    masked,
    module_key,
    operation_key,
    pass_dropout,
)
from workers.engine.engine import TorchBackend
from workers.engine.products import SegmentLoop
from workers.operations import StepRequest

EXACT = 1e-9
# A backward pass finds the masks of a pass of up to 256 tokens kept, and draws others anew.
LENGTHS = {"kept": [5, 23, 9, 12], "drawn-anew": [25, 30, 17, 29] * 3}
OPERATION = 1


class EngineMasks(nn.Module):
    """In the place of a layer's dropout, on padded rows: what the engine's documents define."""

    def __init__(self, module: str, seed: int, p: float) -> None:
        super().__init__()
        self.key, self.seed, self.p = module_key(module), seed, p

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, positions, features], with or without a dimension of 1 between."""
        rows, features = inputs.shape[0], inputs.shape[-1]
        positions = inputs[0, ..., 0].numel()
        numbers = torch.empty(4, rows, positions, dtype=torch.int64)
        numbers[0] = torch.arange(positions)
        numbers[1] = torch.arange(rows)[:, None]
        numbers[2], numbers[3] = operation_key(self.seed, OPERATION), last_dropped(self.p)
        bits = pass_dropout(numbers.flatten(1)).mask(self.key, features)
        mask = masked(inputs.new_ones(rows * positions, features), bits)
        return inputs * mask.view_as(inputs) / kept_share(self.p)


def plain_dropping(family: Family, backend: TorchBackend, run_id: str) -> PlainPeft:
    run = backend._runs[run_id]
    plain = PlainPeft(family.build(), run)
    for name, layer in plain.model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"] = EngineMasks(name, run.seed, run.settings.lora.dropout)
    return plain


def open_run(backend: TorchBackend, run: str, family: Family, seed: int, **lora) -> None:
    backend.open_run(run, settings(seed=seed, lora={"target_modules": family.linear} | lora), None)
    perturb(backend, run, seed)
    # Masks are those of a call, so the one that is compared is not the first.
    backend.forward_backward(run, 1, request_of(rows_of(1, [7])))
    backend.optim_step(run, StepRequest())
    assert backend._runs[run].backwards == OPERATION


def check(backend: TorchBackend, run_id: str, plain: PlainPeft, outcome, rows) -> None:
    loss = plain.loss(rows)
    loss.backward()
    assert metric(outcome, "loss") == pytest.approx(loss.item(), abs=EXACT)
    theirs = [own * (torch.arange(len(own)) >= 1) for own in plain.logprobs(rows)]
    np.testing.assert_allclose(outcome.logprobs, torch.cat(theirs), rtol=0, atol=EXACT)
    run = backend._runs[run_id]
    gradients = run.adapter.named(run.accumulator / run.window.denominator)
    reference = plain.named()
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, reference[name].grad, rtol=0, atol=EXACT, msg=name)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_run_alone(family, lengths):
    rows = rows_of(3, lengths)
    with Wide():
        backend = TorchBackend([freeze("tiny", family.build())], token_budget=10_000)
        open_run(backend, "run", family, 5, rank=3, alpha=7.0, dropout=0.3)
        plain = plain_dropping(family, backend, "run")
        undropped = backend.forward("run", request_of(rows))
        outcome = backend.forward_backward("run", 2, request_of(rows))
        check(backend, "run", plain, outcome, rows)
    assert abs(metric(outcome, "loss") - metric(undropped, "loss")) > 1e-4


@pytest.mark.parametrize("product", [SegmentLoop(), PaddedBmm()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-windows"])
def test_each_of_a_group_whose_dropouts_differ(name, lengths, product):
    family = FAMILIES[name]
    # By their longest rows they lie in a pass in this order.
    members = {
        "first": ({"rank": 5, "alpha": 3.0, "dropout": 0.1}, [*lengths[:2], 31]),
        "middle": ({"rank": 3, "alpha": 7.0, "dropout": 0.5}, lengths),
        "last": ({"rank": 2, "alpha": 9.0, "dropout": 0.0}, [19, 4]),
    }
    with Wide():
        model = freeze("tiny", family.build())
        backend = TorchBackend([model], token_budget=10_000)
        model.product = product
        drawn = [rows_of(seed, own) for seed, (_, own) in enumerate(members.values())]
        calls, plain = [], {}
        for seed, (run, (lora, _)) in enumerate(members.items()):
            open_run(backend, run, family, seed, **lora)
            plain[run] = plain_dropping(family, backend, run)
            calls.append((run, 2, request_of(drawn[seed])))
        outcomes = backend.forward_backward_group(calls)
        for run, rows, outcome in zip(members, drawn, outcomes, strict=True):
            check(backend, run, plain[run], outcome, rows)
