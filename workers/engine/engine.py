"""The torch backend: composes models, runs, training, sampling and checkpoints."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import peft
import torch
import transformers

from tensafe.wire.status import TenSafeFault
from workers.backend import Backend
from workers.engine import checkpoints, training, updates
from workers.engine.adapters import Adapter
from workers.engine.base_model import BaseModel
from workers.engine.budget import TokenBudget
from workers.engine.cards import model_card
from workers.engine.graphs.graphs import graphs_of
from workers.engine.measuring import free_bytes, measure_budget, token_bytes
from workers.engine.memory import memory_faults, thread_is_spoiled
from workers.engine.objectives import Objective, resolve
from workers.engine.optimizers import RunOptimizer
from workers.engine.privacy.noise import NoiseThread
from workers.engine.privacy.runs import PrivateRun, check_private
from workers.engine.processor import processor, told
from workers.engine.program import PROGRAM
from workers.engine.residency import Residency
from workers.engine.run import Run
from workers.engine.sampling.sampler import TorchSampler
from workers.losses import LossCard, LossRegistry
from workers.operations import (
    ArtifactWeights,
    LoadOutcome,
    LoraSettings,
    LossOutcome,
    LossRequest,
    ModelCard,
    RunSettings,
    SaveOutcome,
    StepOutcome,
    StepRequest,
)
from workers.window import Window

T = TypeVar("T")
R = TypeVar("R")

_MOST_RANK = 1024
_RUNS_SHARE = 1 / 3
_SAMPLE_SHARE = 1 / 8
# With more tokens at once the products are as fast as they get, and company gains nothing: on a CPU
# 8 runs of 16 to 128 tokens gain, 8 of 512 do not. On a GPU 8 of 512 gain 1.9 ×, 32 of 256 1.7.
_GROUP_TOKENS_CPU = 1024
_GROUP_TOKENS_GPU = 8192


class TorchBackend(Backend):
    """Runs on frozen base models.

    Args:
        models: at least one, all on one device.
        token_budget: most tokens of one pass; None measures what fits.
        run_bytes: memory that runs' adapters and optimizers may take before idle ones wait on
            disk; None: a third of what is free.
        losses: what may be minimised; None for the built-in losses.
        sample_bytes: memory for the keys and values of rows that are sampled, and for the adapters
            beside them; None: an eighth of what is free.
        captures: whether a GPU captures passes of sizes that come again, and replays them.
    """

    name = "torch"
    credits = 256

    def __init__(
        self,
        models: Sequence[BaseModel],
        token_budget: int | None = None,
        run_bytes: int | None = None,
        losses: LossRegistry | None = None,
        sample_bytes: int | None = None,
        captures: bool = True,
    ) -> None:
        self._losses = losses or LossRegistry()
        self.device = models[0].device
        # A pass may have set another number.
        self._threads = torch.get_num_threads()
        self.group_tokens = _GROUP_TOKENS_CPU if self.device == "cpu" else _GROUP_TOKENS_GPU
        self._models = {name: m for m in models for name in (m.name, *m.references)}
        self._cards = [model_card(model) for model in models]
        self._budgets = {
            model.name: TokenBudget(token_budget) if token_budget else measure_budget(model)
            for model in models
        }
        for model in models:
            tokens = self._budgets[model.name].tokens
            model.graphs = graphs_of(model, tokens, len(models)) if captures else None
        if run_bytes is None:
            run_bytes = int(_RUNS_SHARE * free_bytes(self.device))
        self._runs = Residency(run_bytes, self._new_run, self.fingerprint)
        if sample_bytes is None:
            sample_bytes = int(_SAMPLE_SHARE * free_bytes(self.device))
        self._sampler = TorchSampler(
            self._models, self._runs.__getitem__, _check_lora, sample_bytes
        )
        self.sample_tokens = self._sampler.tokens
        self._noise = NoiseThread()

    @property
    def thread_is_spoiled(self) -> bool:
        return thread_is_spoiled()

    def models(self) -> Sequence[ModelCard]:
        return self._cards

    def losses(self) -> Sequence[LossCard]:
        return self._losses.cards()

    def fingerprint(self) -> dict[str, str]:
        facts = {
            "backend": "torch",
            "engine": PROGRAM,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "device": self.device,
            "cpu": processor(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "told": told(),
            "threads": str(self._threads),
            "dtype": ",".join(sorted({card.dtype for card in self._cards})),
        }
        if self.device.startswith("cuda"):
            facts["cuda_device"] = torch.cuda.get_device_name(self.device)
            facts["cuda"] = torch.version.cuda or ""
            graphs = any(model.graphs is not None for model in self._models.values())
            facts["cuda_graphs"] = "on" if graphs else "off"
        return facts

    def open_run(self, run_id: str, settings: RunSettings, state: Path | None) -> None:
        with memory_faults("adapter"):
            run = self._new_run(run_id, settings)
            if state is not None:
                checkpoints.load(run, state, include_optimizer=True)
            else:
                run.adapter.initialize(settings.seed)
            self._runs[run_id] = run

    def _new_run(self, run_id: str, settings: RunSettings) -> Run:
        """One whose weights are all zero."""
        model = self.base_model(settings.model_ref)
        _check_lora(model, settings.lora)
        adapter = model.new_adapter(settings.lora)
        private, unit_tokens = None, 0
        if settings.privacy is not None:
            check_private(settings, settings.privacy, adapter)
            weights = adapter.weights
            private = PrivateRun(settings.privacy, self._noise, len(weights), weights.dtype)
            unit_tokens = math.ceil(weights.nbytes / token_bytes(model))
        return Run(
            run_id=run_id,
            settings=settings,
            model=model,
            adapter=adapter,
            optimizer=RunOptimizer(settings.optimizer, adapter.weights),
            window=Window(
                settings.accumulation_steps, settings.max_steps, closes_empty=private is not None
            ),
            seed=settings.seed,
            private=private,
            unit_tokens=unit_tokens,
        )

    def close_run(self, run_id: str) -> None:
        self._runs.pop(run_id)
        self._sampler.pins.let_go(run_id)

    def poison(self, run_id: str) -> None:
        self._runs[run_id].window.poison()

    def drop_window(self, run_id: str) -> None:
        self._runs[run_id].drop_window()

    def forward(self, run_id: str, request: LossRequest) -> LossOutcome:
        run = self._runs[run_id]
        return training.forward(run, request, self._budgets[run.model.name], self._objective)

    def forward_backward(self, run_id: str, seq: int, request: LossRequest) -> LossOutcome:
        return _only(self.forward_backward_group([(run_id, seq, request)]))

    def forward_backward_group(
        self, entries: Sequence[tuple[str, int, LossRequest]]
    ) -> list[LossOutcome | Exception]:
        runs = self._runs.take(run_id for run_id, _, _ in entries)

        def compute(
            members: Sequence[tuple[Run, LossRequest]],
        ) -> Sequence[LossOutcome | Exception]:
            (name,) = {run.model.name for run, _ in members}
            return training.forward_backward(members, self._budgets[name], self._objective)

        return _of_those_here(runs, [request for _, _, request in entries], compute)

    def _objective(self, run: Run, request: LossRequest) -> Objective:
        def adapter_of(artifact: ArtifactWeights) -> Adapter:
            with memory_faults("reference"):
                weights = self._sampler.artifacts.of(artifact, run.model.name)
            if weights.adapter is None or weights.model is not run.model:
                raise TenSafeFault(
                    "ARTIFACT_MISMATCH",
                    f"artifact {artifact.artifact_id} is an adapter of {weights.model.name} and "
                    f"the run is on {run.model.name}; name one of the run's own model",
                    field="loss.reference.artifact_id",
                )
            return weights.adapter

        return resolve(request, self._losses, adapter_of)

    def optim_step(self, run_id: str, request: StepRequest) -> StepOutcome:
        return _only(self.optim_step_group([(run_id, request)]))

    def optim_step_group(
        self, entries: Sequence[tuple[str, StepRequest]]
    ) -> list[StepOutcome | Exception]:
        runs = [self._before_change(run) for run in self._runs.take(one for one, _ in entries)]
        return _of_those_here(runs, [request for _, request in entries], updates.optim_step)

    def _before_change(self, run: Run | Exception) -> Run | Exception:
        """The run, ready to be changed; or why it is not to be."""
        try:
            if isinstance(run, Run):
                with memory_faults("copy of the weights that samples go by"):
                    self._sampler.pins.before_change(run)
        except TenSafeFault as fault:
            return fault
        return run

    @property
    def sampler(self) -> TorchSampler:
        return self._sampler

    def save_state(self, run_id: str, directory: Path, include_optimizer: bool) -> SaveOutcome:
        run = self._runs[run_id]
        return checkpoints.save(run, directory, include_optimizer, self.fingerprint())

    def capture(self, run_id: str) -> checkpoints.Captured:
        return checkpoints.capture(self._runs[run_id], True, self.fingerprint())

    def load_state(
        self, run_id: str, directory: Path, include_optimizer: bool | None
    ) -> LoadOutcome:
        run = self._runs[run_id]
        with memory_faults("copy of the weights that samples go by"):
            self._sampler.pins.before_change(run)
        return checkpoints.load(run, directory, include_optimizer)

    def base_model(self, reference: str) -> BaseModel:
        """The model of a name or another reference.

        Raises:
            TenSafeFault: MODEL_NOT_FOUND.
        """
        model = self._models.get(reference)
        if model is None:
            raise TenSafeFault(
                "MODEL_NOT_FOUND",
                f"no model is registered as {reference!r}; list the models to see what there is",
                field="model_ref",
                model_ref=reference,
            )
        return model


def _of_those_here(
    runs: Sequence[Run | Exception],
    requests: Sequence[R],
    execute: Callable[[Sequence[tuple[Run, R]]], Sequence[T | Exception]],
) -> list[T | Exception]:
    """What came of each request; where its run is not here, why."""
    pairs = zip(runs, requests, strict=True)
    here = [(run, request) for run, request in pairs if isinstance(run, Run)]
    outcomes = iter(execute(here) if here else [])
    return [run if isinstance(run, Exception) else next(outcomes) for run in runs]


def _only(outcomes: Sequence[T | Exception]) -> T:
    (outcome,) = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _check_lora(model: BaseModel, lora: LoraSettings) -> None:
    if not 1 <= lora.rank <= _MOST_RANK:
        raise TenSafeFault(
            "INVALID_ARGUMENT",
            f"lora.rank is {lora.rank}; it must be 1 to {_MOST_RANK}",
            field="lora.rank",
        )
    if not 0 <= lora.dropout < 1:
        raise TenSafeFault(
            "INVALID_ARGUMENT",
            f"lora.dropout is {lora.dropout}; it must be from 0 to below 1",
            field="lora.dropout",
        )
    unknown = sorted(set(lora.target_modules) - set(model.linear_modules))
    if unknown:
        raise TenSafeFault(
            "UNKNOWN_TARGET_MODULE",
            f"model {model.name} has no linear module {unknown[0]!r}; it has "
            f"{', '.join(sorted(model.linear_modules))}",
            field="lora.target_modules",
            module=unknown[0],
        )
