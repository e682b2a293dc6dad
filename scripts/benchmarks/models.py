"""The model of a benchmark: as the engine has it, and as a user has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import random_models
from workers.engine.compiling import Compiling, compile_if_asked
from workers.engine.engine import TorchBackend
from workers.engine.loading import load_backend, pick_device, pick_dtype
from workers.engine.model_sources import resolve

SMOLLM2 = "smollm2-135m"
NAMES = (SMOLLM2, *random_models.NAMES)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which model, and how it is computed; the device is the machine's best.

    Attributes:
        model: one of `NAMES`.
        dtype, compiling, cuda_graphs: values of the options that workers have.
        threads: torch's CPU threads.
    """

    model: str
    dtype: str = "auto"
    threads: int = 1
    compiling: str = "auto"
    cuda_graphs: str = "auto"

    @property
    def device(self) -> str:
        """Such as `cpu` or `cuda:0`."""
        return pick_device("auto")

    @property
    def torch_dtype(self) -> torch.dtype:
        """What `dtype` means on the device."""
        return pick_dtype(self.dtype, self.device)

    @property
    def vocabulary(self) -> int:
        """Tokens to draw from."""
        return 49_000 if self.model == SMOLLM2 else random_models.vocabulary(self.model)

    def backend(self) -> TorchBackend:
        """As a worker makes it."""
        compiling, captures = Compiling(self.compiling), self.cuda_graphs == "auto"
        if compiling is Compiling.AUTO and self.device != "cpu":
            compiling = Compiling.FIRST  # or nothing: a table is of one or the other
        if self.model == SMOLLM2:
            return load_backend(
                [self.model],
                device="auto",
                dtype=self.dtype,
                threads=self.threads,
                compiling=compiling,
                captures=captures,
            )
        torch.set_num_threads(self.threads)
        base = random_models.base_model(self.model, self.device, self.torch_dtype)
        backend = TorchBackend([base], captures=captures)
        compile_if_asked(compiling, self.device, self.torch_dtype)
        return backend

    def plain(self) -> Any:
        """As `transformers` gives it to whoever asks for nothing but the type."""
        if self.model != SMOLLM2:
            return random_models.build(self.model, self.device, self.torch_dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(self.model).location, dtype=self.torch_dtype
        )
        return loaded.to(self.device)
