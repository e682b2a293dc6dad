"""A private step against the same step without privacy, plain `peft`, and Opacus where it is there.

All take turns in one process on the same threads, model and rows; a figure is seconds of one
training step, forward to update, and a ratio is the median of those of neighbouring turns, so that
what else the machine does meets both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine import ALPHA, RANK, RATE, TARGETS, Setting, plain_loop
from benchmarks.engine_rows import MIXED, Rows, make_rows
from tensafe.wire.losses import Reduction
from workers.operations import PrivacySettings, StepRequest

BOUND, SIGMA = 0.1, 1.0
CELLS = ("8x128", "mixed", "32x32")
Step = Callable[[], None]


def cells(vocabulary: int) -> dict[str, Rows]:
    """Equal rows, rows of mixed length, short rows."""
    return {
        "8x128": make_rows([128] * 8, 0.0, vocabulary),
        "mixed": make_rows(MIXED, 0.6, vocabulary),
        "32x32": make_rows([32] * 32, 0.0, vocabulary),
    }


def measure(
    setting: Setting, ghost: nn.Module | None, names: Sequence[str] = CELLS
) -> dict[str, list[float]]:
    """Seconds by `CELL/SIDE`, one for each round.

    Args:
        names: of the cells that are measured.
        ghost: a base model of its own for Opacus; None to leave it out.
    """
    backend = setting.backend
    run = setting.run_settings()
    privacy = PrivacySettings(SIGMA, BOUND, 8.0)
    backend.open_run("plain", run, None)
    backend.open_run("private", replace(run, privacy=privacy), None)
    peft_step = plain_loop(setting.plain(), setting.dropout, 1)
    opacus_step = None if ghost is None else ghost_loop(ghost, setting.dropout)
    found: dict[str, list[float]] = {}
    made = cells(setting.vocabulary)
    for name in names:
        rows = made[name]
        rows.ours.reduction = Reduction.SEQUENCE_MEAN
        steps: dict[str, Step] = {
            "private": lambda rows=rows: engine_step(setting, "private", rows),
            "engine": lambda rows=rows: engine_step(setting, "plain", rows),
            "peft": lambda rows=rows: peft_step([rows]),
        }
        if opacus_step is not None:
            steps["opacus"] = lambda rows=rows: opacus_step(rows)
        _take_turns(steps, setting, name, found)
    for name in ("plain", "private"):
        backend.close_run(name)
    return found


def engine_step(setting: Setting, run_id: str, rows: Rows) -> None:
    """Forward, backward, update."""
    setting.backend.forward_backward(run_id, 1, rows.ours)
    setting.backend.optim_step(run_id, StepRequest(charged=True))


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """The private step over each of the others, and Opacus over plain `peft`."""
    result = {}
    for cell in dict.fromkeys(name.partition("/")[0] for name in found):
        for one, two in (
            ("private", "engine"),
            ("private", "peft"),
            ("private", "opacus"),
            ("opacus", "peft"),
        ):
            ours, theirs = (found.get(f"{cell}/{side}") for side in (one, two))
            if ours and theirs:
                pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
                result[f"{cell} {one}/{two}"] = median(pairs)
    return result


def _take_turns(
    steps: dict[str, Step], setting: Setting, cell: str, found: dict[str, list[float]]
) -> None:
    for step in steps.values():
        step()
    for number in range(setting.rounds):
        # In turn forwards and backwards, so that nobody always comes behind the same neighbour.
        order = list(steps.items())
        for name, step in order if number % 2 else reversed(order):
            begin = setting.clock()
            step()
            found.setdefault(f"{cell}/{name}", []).append(setting.clock() - begin)


def ghost_loop(base: nn.Module, dropout: float) -> Callable[[Rows], None]:
    """`peft` under Opacus with ghost clipping, of each row's own token mean.

    Raises:
        ImportError: Opacus is not installed.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(TARGETS)
    )
    model: Any = get_peft_model(base, config)
    model.train()
    bound = {"max_grad_norm": BOUND, "loss_reduction": "sum"}
    wrapped = GradSampleModuleFastGradientClipping(model, use_ghost_clipping=True, **bound)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.AdamW(own, lr=RATE, weight_decay=0.01),
        noise_multiplier=SIGMA,
        expected_batch_size=8,
        **bound,
    )

    def step(rows: Rows) -> None:
        batch = rows.theirs
        logits = wrapped(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        losses = _row_means(logits, batch["labels"])
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _row_means(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:  # noqa: N803
    """[B]: each row's own token mean; positions are shifted here."""
    targets = labels_BT[:, 1:]
    losses = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape).sum(1) / (targets != -100).sum(1)
