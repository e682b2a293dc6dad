"""What a user does with a downloaded adapter: plain `transformers` and `peft`, nothing of ours.

Only the base model's directory comes from TenSafe, since the alias `smollm2-135m` is no hub id.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tensafe.wire.tensors import Array


class PlainPeft:
    """A base model with a downloaded adapter.

    Args:
        base: directory of the base model.
        adapter: directory that an artifact was downloaded to.
        dtype: element type of the frozen weights, by its name in torch.
    """

    def __init__(self, base: Path, adapter: Path, dtype: str = "float32") -> None:
        logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
            self._model = self._load(base, adapter, dtype)

    @staticmethod
    def _load(base: Path, adapter: Path, dtype: str) -> PeftModel:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        return PeftModel.from_pretrained(model, str(adapter)).eval()

    @torch.inference_mode()
    def logprobs(self, tokens: Array, target_tokens: Array) -> Array:
        """float32 [T]: log-probability of each target token.

        Args:
            tokens: int [T], what the model reads.
            target_tokens: int [T], what it is asked about.
        """
        # [1, T] in; [T, V] logits.
        input_ids = torch.as_tensor(tokens, dtype=torch.long)[None]
        targets = torch.as_tensor(target_tokens, dtype=torch.long)[:, None]
        logits = self._model(input_ids=input_ids).logits[0].float()
        chosen = logits.log_softmax(-1).gather(-1, targets)[:, 0]
        logprobs: Array = chosen.numpy()
        return logprobs

    @torch.inference_mode()
    def behind_greedy(self, prompt: list[int], completion: list[int]) -> Array:
        """float32 [N]: how much less likely than the likeliest token each of a completion's is.

        Differences of log-probabilities; 0 where `generate` would have chosen the same token.
        """
        input_ids = torch.as_tensor([prompt + completion])
        logits = self._model(input_ids=input_ids).logits[0, len(prompt) - 1 : -1].float()
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, torch.as_tensor(completion, dtype=torch.long)[:, None])[:, 0]
        behind: Array = (logprobs.amax(-1) - chosen).numpy()
        return behind
