"""The torch backend's sampler: finds an operation's weights and prompts, and decodes by model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.memory import memory_faults
from workers.engine.run import Run
from workers.engine.sampling.decoder import Decoder
from workers.engine.sampling.prompts import PromptReader
from workers.engine.sampling.rows import Job
from workers.engine.sampling.weights import ArtifactShelf, PinnedWeights, Pins
from workers.operations import LoraSettings, SampleOutcome, SampleRequest
from workers.sampler import OnChunk

_MOST_ROWS_CPU, _MOST_ROWS_GPU = 64, 256
_PROMPT_TOKENS_CPU, _PROMPT_TOKENS_GPU = 512, 8192
_CHARACTERS_AT_ONCE = 2**15
"""Text that is encoded between two steps of whatever else there is: some 10 ms of a core."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """An operation on its way to a decoder."""

    operation_id: str
    request: SampleRequest
    weights: PinnedWeights
    draws: tuple[int, str | int]
    on_chunk: OnChunk | None
    prompts: PromptReader


class TorchSampler:
    """A `Sampler` over the engine's own models and runs.

    Args:
        models: by each of their names.
        find_run: a run by its id.
        check_lora: refuses what a model cannot have.
        cache_bytes: memory for keys and values, all models together.

    Attributes:
        pins: to be told before a run's weights change.
    """

    def __init__(
        self,
        models: Mapping[str, BaseModel],
        find_run: Callable[[str], Run],
        check_lora: Callable[[BaseModel, LoraSettings], None],
        cache_bytes: int,
    ) -> None:
        self._models = models
        self._find_run = find_run
        self.pins = Pins()
        self._reading: deque[_Taken] = deque()
        self._failed: list[tuple[str, SampleOutcome | Exception]] = []
        self.artifacts = ArtifactShelf(self._model, check_lora)
        distinct = list({id(model): model for model in models.values()}.values())
        self._decoders = {
            model.name: Decoder(
                model,
                self.artifacts,
                cache_bytes=cache_bytes // len(distinct),
                most_rows=_MOST_ROWS_CPU if model.device == "cpu" else _MOST_ROWS_GPU,
                prompt_tokens=_PROMPT_TOKENS_CPU if model.device == "cpu" else _PROMPT_TOKENS_GPU,
            )
            for model in distinct
        }

    @property
    def tokens(self) -> int:
        """Most tokens of rows that are held at once, of whatever model."""
        return min(decoder.tokens for decoder in self._decoders.values())

    def submit(
        self,
        operation_id: str,
        key: str | int,
        request: SampleRequest,
        on_chunk: OnChunk | None = None,
    ) -> None:
        with memory_faults("sample"):
            weights = self._weights(request)
            taken = _Taken(
                operation_id,
                request,
                weights,
                _draws(weights, key, request),
                on_chunk if request.stream else None,
                PromptReader(weights.model, request.prompts),
            )
            self._read(taken)
        if not taken.prompts.complete:
            self._reading.append(taken)

    @property
    def busy(self) -> bool:
        return bool(self._reading or self._failed) or any(
            decoder.busy for decoder in self._decoders.values()
        )

    def step(self) -> None:
        if self._reading:
            self._read_on()
        for decoder in self._decoders.values():
            decoder.step()

    def collect(self) -> list[tuple[str, SampleOutcome | Exception]]:
        failed, self._failed = self._failed, []
        ended = [each for decoder in self._decoders.values() for each in decoder.collect()]
        return [*failed, *ended]

    def _read_on(self) -> None:
        """Encodes some more of one operation: each has its turn, so that none waits for all of a
        larger one."""
        taken = self._reading.popleft()
        try:
            with memory_faults("sample"):
                self._read(taken)
        except Exception as error:  # this operation's alone
            self._failed.append((taken.operation_id, error))
            return
        if not taken.prompts.complete:
            self._reading.append(taken)

    def _read(self, taken: _Taken) -> None:
        """Encodes some of its prompts; one that has all of them is decoded."""
        taken.prompts.read(_CHARACTERS_AT_ONCE)
        if taken.prompts.complete:
            job = Job(
                taken.operation_id,
                taken.request,
                taken.weights,
                taken.prompts.encoded,
                taken.draws,
                taken.on_chunk,
            )
            self._decoders[taken.weights.model.name].submit(job)

    def cancel(self, operation_id: str) -> None:
        self._reading = deque(one for one in self._reading if one.operation_id != operation_id)
        self._failed = [one for one in self._failed if one[0] != operation_id]
        for decoder in self._decoders.values():
            decoder.cancel(operation_id)

    def _weights(self, request: SampleRequest) -> PinnedWeights:
        if request.artifact is not None:
            return self.artifacts.of(request.artifact, request.model_ref)
        if request.run_id is not None:
            return self.pins.of(self._find_run(request.run_id))
        return PinnedWeights(self._model(request.model_ref), None, 0, 0, False)

    def _model(self, reference: str) -> BaseModel:
        model = self._models.get(reference)
        if model is None:
            raise TenSafeFault(
                "MODEL_NOT_FOUND",
                f"no model is registered as {reference!r}; list the models to see what there is",
                field="model_ref",
                model_ref=reference,
            )
        return model


def _draws(weights: PinnedWeights, key: str | int, request: SampleRequest) -> tuple[int, str | int]:
    """Seed, and what tells the call's draws from others' under the same seed."""
    if request.params.seed is not None:
        return request.params.seed, "call"
    if request.artifact is not None:
        return weights.seed, f"step {weights.step}"
    return weights.seed, key
