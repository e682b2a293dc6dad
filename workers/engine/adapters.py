"""LoRA adapters of many runs on one frozen model, each one flat vector.

An adapter's tensors are views into one vector, and so are their gradients: norms, accumulation,
clipping and the optimizer each take one operation instead of one per tensor. Names, shapes and
initialisation are `peft`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensafe.wire.status import TenSafeFault
from workers.engine.dropout import kept_share
from workers.engine.randomness import cpu_generator
from workers.operations import LoraSettings

_KEY = "base_model.model.{module}.{side}.weight"
"""A tensor's name in `adapter_model.safetensors`, as `peft` writes it."""

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Module → A and B, or what belongs to each."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in the adapter's vector."""

    key: str
    module: str
    shape: tuple[int, int]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.shape[0] * self.shape[1]

    def view(self, vector: Tensor) -> Tensor:
        """This tensor's part of a vector laid out like the adapter's; of each, of several."""
        part = vector[..., self.begin : self.end]
        return part.view(*part.shape[:-1], *self.shape)


class Adapter:
    """One run's adapter.

    Attributes:
        settings: its rank, scale, dropout and targets.
        slots: its tensors, in the order of the vector.
        weights: float32 [P], or wider if the model is; what the optimizer steps.
    """

    def __init__(
        self, settings: LoraSettings, slots: list[Slot], device: str, dtype: torch.dtype
    ) -> None:
        self.settings = settings
        self.slots = slots
        self.weights = nn.Parameter(torch.zeros(slots[-1].end, device=device, dtype=dtype))
        self._gradient: Tensor | None = None
        self._gradients: Pairs = {}
        self._views: Pairs | None = None

    def scale(self, *, training: bool) -> float:
        """What B·A is multiplied by; under dropout, what was kept stands for all."""
        scale = self.settings.alpha / self.settings.rank
        return scale / kept_share(self.settings.dropout) if training else scale

    @torch.no_grad()
    def copy(self) -> Adapter:
        """Another one with these weights."""
        twin = Adapter(self.settings, self.slots, str(self.weights.device), self.weights.dtype)
        twin.weights.copy_(self.weights)
        return twin

    def gradient(self) -> Tensor:
        """[P]: where backward passes add; zero when first asked for, until it is released."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.weights, requires_grad=False)
            self._gradients = self.pairs(self._gradient)
        return self._gradient

    def cleared_gradient(self) -> Tensor:
        """The same, zero now too."""
        return self.gradient() if self._gradient is None else self._gradient.zero_()

    def release_gradient(self) -> Tensor | None:
        """Hands the gradient over: between calls a run holds none but its window's sum. None if
        nobody has asked for it."""
        gradient = self._gradient
        self._gradient, self._gradients = None, {}
        return gradient

    def gradients(self) -> Pairs:
        """Module → where A's and B's gradients are added."""
        self.gradient()
        return self._gradients

    def tensors(self, dtype: torch.dtype) -> Pairs:
        """Module → A [r, K] and B [O, r], rounded to `dtype`."""
        weights = self.weights.detach()
        if dtype != weights.dtype:
            return self.pairs(weights.to(dtype))
        # The optimizer steps in place, so that views stay true.
        if self._views is None:
            self._views = self.pairs(weights)
        return self._views

    def pairs(self, vector: Tensor) -> Pairs:
        """Module → A's and B's part of a vector laid out like the weights, or of each of several,
        [..., P] or longer."""
        return pairs(self.slots, vector)

    def named(self, vector: Tensor | None = None) -> dict[str, Tensor]:
        """`peft`'s names → the tensors of a vector laid out like the weights, or of these."""
        vector = self.weights.detach() if vector is None else vector
        return {slot.key: slot.view(vector) for slot in self.slots}

    def vector(self, named: Mapping[str, Tensor]) -> Tensor:
        """The reverse of `named`; names and shapes must fit exactly.

        Raises:
            TenSafeFault: ARTIFACT_MISMATCH, saying what differs.
        """
        missing = {slot.key for slot in self.slots} ^ set(named)
        if missing:
            raise _mismatch(f"its tensors differ from the run's, such as {min(missing)}")
        vector = torch.empty_like(self.weights, requires_grad=False)
        for slot in self.slots:
            tensor = named[slot.key]
            if tuple(tensor.shape) != slot.shape:
                raise _mismatch(
                    f"{slot.key} has shape {list(tensor.shape)} and the run's is {list(slot.shape)}"
                )
            if not tensor.is_floating_point():
                raise _mismatch(f"{slot.key} holds {str(tensor.dtype).removeprefix('torch.')}")
            slot.view(vector).copy_(tensor)
        return vector

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """A by Kaiming-uniform with a = √5, which is U(±1/√fan_in); B zero; as `peft` does."""
        self.weights.zero_()
        for slot in self.slots:
            if ".lora_A." in slot.key:
                bound = 1 / math.sqrt(slot.shape[1])
                drawn = torch.empty(slot.shape).uniform_(
                    -bound, bound, generator=cpu_generator(seed, "init", slot.module)
                )
                slot.view(self.weights).copy_(drawn)


def new_adapter(
    settings: LoraSettings, layers: Mapping[str, nn.Linear], device: str, dtype: torch.dtype
) -> Adapter:
    """An adapter for those layers that the settings target, all zero.

    Args:
        layers: the model's layers that can carry one, by full name.
        dtype: of its numbers.
    """
    slots = lay_out(layers, settings.target_modules, settings.rank)
    return Adapter(settings, slots, device, dtype)


def lay_out(layers: Mapping[str, nn.Linear], targets: Sequence[str], rank: int) -> list[Slot]:
    """Where the tensors of an adapter lie: module after module, its A, then its B.

    Args:
        layers: as `new_adapter` takes them.
        targets: last parts of the modules' names.
    """
    slots: list[Slot] = []
    begin = 0
    for module, layer in layers.items():
        if module.rsplit(".", 1)[-1] not in targets:
            continue
        shapes = (
            ("lora_A", (rank, layer.in_features)),
            ("lora_B", (layer.out_features, rank)),
        )
        for side, shape in shapes:
            slots.append(Slot(_KEY.format(module=module, side=side), module, shape, begin))
            begin = slots[-1].end
    return slots


def pairs(slots: Sequence[Slot], vector: Tensor) -> Pairs:
    """Module → A's and B's part of a vector laid out so, or of each of several, [..., P] or
    longer."""
    leading = vector.shape[:-1]
    whole = vector[..., : slots[-1].end]
    parts = torch.split(whole, [slot.end - slot.begin for slot in slots], -1)
    views = [part.view(*leading, *slot.shape) for part, slot in zip(parts, slots, strict=True)]
    modules = [slot.module for slot in slots[::2]]
    return dict(zip(modules, zip(views[::2], views[1::2], strict=True), strict=True))


def _mismatch(text: str) -> TenSafeFault:
    return TenSafeFault(
        "ARTIFACT_MISMATCH",
        f"the artifact does not fit: {text}; load it into a run with the same model, rank and "
        "target_modules",
        field="artifact_id",
    )
