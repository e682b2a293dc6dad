"""The weights that samples go by, as they were when each was submitted.

A run that trains on changes its adapter in place. Samples share the adapter as long as nothing
changes it; just before something does, those that still go by it get a copy.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from tensafe.wire.status import TenSafeFault
from workers.engine import checkpoints
from workers.engine.adapters import Adapter
from workers.engine.base_model import BaseModel
from workers.engine.run import Run
from workers.operations import ArtifactWeights, LoraSettings

_KEPT_ARTIFACTS = 4


@dataclass(eq=False, slots=True, weakref_slot=True)
class PinnedWeights:
    """What to sample from.

    Attributes:
        adapter: None for the base model. Its numbers never change; the object may be replaced by
            a copy.
        step: applied updates.
        seed: what draws come from.
        deterministic: whether bits are promised.
        owns_adapter: nobody else has the adapter: it is a copy, or an artifact's.
    """

    model: BaseModel
    adapter: Adapter | None
    step: int
    seed: int
    deterministic: bool
    owns_adapter: bool = False

    @property
    def adapter_bytes(self) -> int:
        """Memory of the adapter; 0 for the base model."""
        return 0 if self.adapter is None else self.adapter.weights.nbytes

    def check_finite(self) -> None:
        """Weights that are not finite would make the numbers of others who are beside them so.

        Raises:
            TenSafeFault: NON_FINITE_LOSS.
        """
        if self.adapter is None:
            return
        scale = max(1.0, self.adapter.scale(training=False))
        largest = self.adapter.weights.detach().abs().max().double() * scale
        if not largest < torch.finfo(self.model.faithful_adapter_dtype).max:
            raise TenSafeFault(
                "NON_FINITE_LOSS",
                "the run's weights are NaN, infinite or about to be; load an earlier state of the "
                "run",
            )


class Pins:
    """The weights of runs that samples go by now."""

    def __init__(self) -> None:
        self._live: dict[str, weakref.ref[PinnedWeights]] = {}

    def of(self, run: Run) -> PinnedWeights:
        """The run's weights of this moment.

        Raises:
            TenSafeFault: NON_FINITE_LOSS.
        """
        live = self._live.get(run.run_id)
        pinned = live() if live is not None else None
        if pinned is None or pinned.adapter is not run.adapter:
            self.let_go(run.run_id)
            pinned = PinnedWeights(
                run.model, run.adapter, run.window.step, run.seed, run.settings.deterministic
            )
            pinned.check_finite()
            self._live[run.run_id] = weakref.ref(pinned)
        return pinned

    def let_go(self, run_id: str) -> None:
        """The run has left its adapter to those who go by it."""
        live = self._live.pop(run_id, None)
        pinned = live() if live is not None else None
        if pinned is not None:
            pinned.owns_adapter = True

    def before_change(self, run: Run) -> None:
        """The run's adapter is about to change: whoever goes by it gets a copy. If there is no room
        for one, it must not change, and they go by it still."""
        live = self._live.get(run.run_id)
        pinned = live() if live is not None else None
        if pinned is not None:
            if pinned.adapter is run.adapter:
                pinned.adapter = run.adapter.copy()
            pinned.owns_adapter = True
        self._live.pop(run.run_id, None)


class ArtifactShelf:
    """The adapters of artifacts that were sampled from last.

    Args:
        find_model: a base model by its name.
        check_lora: refuses what the model cannot have.
    """

    def __init__(
        self,
        find_model: Callable[[str], BaseModel],
        check_lora: Callable[[BaseModel, LoraSettings], None],
    ) -> None:
        self._find_model = find_model
        self._check_lora = check_lora
        self._kept: OrderedDict[str, PinnedWeights] = OrderedDict()

    def idle(self, model: BaseModel, used: Collection[PinnedWeights]) -> list[PinnedWeights]:
        """A model's that are kept beside those in use."""
        return [one for one in self._kept.values() if one.model is model and one not in used]

    def clear(self, model: BaseModel, used: Collection[PinnedWeights]) -> bool:
        """Keeps a model's no longer, but for those in use; whether there were any."""
        idle = self.idle(model, used)
        for name in [name for name, one in self._kept.items() if one in idle]:
            del self._kept[name]
        return bool(idle)

    def of(self, artifact: ArtifactWeights, model_ref: str) -> PinnedWeights:
        """An artifact's weights.

        Args:
            model_ref: the model of an adapter that came from elsewhere.

        Raises:
            TenSafeFault: ARTIFACT_MISMATCH, MODEL_NOT_FOUND, NON_FINITE_LOSS; CHECKSUM_MISMATCH if
                its files cannot be read.
        """
        if artifact.artifact_id in self._kept:
            self._kept.move_to_end(artifact.artifact_id)
            return self._kept[artifact.artifact_id]
        try:
            pinned = self._read(artifact, model_ref)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise TenSafeFault(
                "CHECKSUM_MISMATCH",
                f"the files of artifact {artifact.artifact_id} cannot be read at the worker: "
                f"{type(error).__name__}; save the artifact again, or have the operator look at "
                "the worker's disk",
                artifact_id=artifact.artifact_id,
            ) from error
        pinned.check_finite()
        self._kept[artifact.artifact_id] = pinned
        if len(self._kept) > _KEPT_ARTIFACTS:
            self._kept.popitem(last=False)
        return pinned

    def _read(self, artifact: ArtifactWeights, model_ref: str) -> PinnedWeights:
        state = checkpoints.read_state(artifact.directory, model_ref)
        model = self._find_model(state["model"])
        settings = checkpoints.lora_settings(state)
        self._check_lora(model, settings)
        adapter = model.new_adapter(settings)
        with torch.no_grad():
            adapter.weights.copy_(checkpoints.read_weights(adapter, artifact.directory))
        return PinnedWeights(
            model,
            adapter,
            int(state["step"]),
            int(state.get("seed", 0)),  # artifacts saved without optimizer had none at first
            bool(state.get("deterministic", False)),
            owns_adapter=True,
        )
