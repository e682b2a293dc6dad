"""The torch backend's sampler: finds an operation's weights and prompts, and decodes by model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.memory import memory_faults
from workers.engine.run import Run
from workers.engine.sampling import prompts
from workers.engine.sampling.decoder import Decoder
from workers.engine.sampling.rows import Job
from workers.engine.sampling.weights import ArtifactShelf, PinnedWeights, Pins
from workers.operations import LoraSettings, SampleOutcome, SampleRequest
from workers.sampler import OnChunk

_MOST_ROWS_CPU, _MOST_ROWS_GPU = 64, 256
_PROMPT_TOKENS_CPU, _PROMPT_TOKENS_GPU = 512, 8192


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
            encoded = prompts.encode(weights.model, request.prompts)
            job = Job(
                operation_id,
                request,
                weights,
                encoded,
                _draws(weights, key, request),
                on_chunk if request.stream else None,
            )
            self._decoders[weights.model.name].submit(job)

    @property
    def busy(self) -> bool:
        return any(decoder.busy for decoder in self._decoders.values())

    def step(self) -> None:
        for decoder in self._decoders.values():
            decoder.step()

    def collect(self) -> list[tuple[str, SampleOutcome | Exception]]:
        return [each for decoder in self._decoders.values() for each in decoder.collect()]

    def cancel(self, operation_id: str) -> None:
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
