"""What the engine is held to: plain `transformers` and `peft`, padded, with Hugging Face's loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import torch
from parity.tiny_runs import Masked, hf_batch
from torch import Tensor

from workers.engine.training import Run


class PlainPeft:
    """A `peft` model that begins with a run's adapter.

    Args:
        module: a `transformers` model of its own.
        run: whose adapter and LoRA settings it takes over.
    """

    def __init__(self, module: Any, run: Run) -> None:
        lora = run.settings.lora
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(module, config).eval()
        named = {name: tensor.clone() for name, tensor in run.adapter.named().items()}
        # `peft` makes adapters in float32 over a wider base.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = named.pop(_plain(name))
        assert not named

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return list(self.named().values())

    def named(self) -> dict[str, Tensor]:
        """The same by the names of saved files."""
        return {
            _plain(name): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def loss(self, rows: list[np.ndarray], masked: Masked = 1) -> Tensor:
        """Hugging Face's mean over the scored positions."""
        return self.model(**hf_batch(rows, masked=masked)).loss

    @torch.no_grad()
    def logprobs(self, rows: list[np.ndarray]) -> list[Tensor]:
        """Of every target, row by row, from all logits."""
        batch = hf_batch(rows)
        logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        wide = torch.promote_types(logits.dtype, torch.float32)
        everywhere = torch.log_softmax(logits.to(wide), -1)
        targets = [torch.from_numpy(row[1:].astype(np.int64)) for row in rows]
        return [
            everywhere[index, : len(own)].gather(1, own[:, None])[:, 0]
            for index, own in enumerate(targets)
        ]


def _plain(name: str) -> str:
    return name.replace(".default.", ".")
