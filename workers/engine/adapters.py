"""LoRA adapters of many runs on one frozen model, each one flat float32 vector.

`peft` puts its layers into the model and does the forward pass. The weights of an adapter are views
into one vector, and so are their gradients: norms, accumulation, clipping and the optimizer each
take one operation instead of one per tensor.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tensafe.wire.status import TenSafeFault
from workers.engine.dropout import CounterDropout, DropoutScope
from workers.engine.randomness import cpu_generator
from workers.operations import LoraSettings

_KEY = "base_model.model.{module}.{side}.weight"
"""A tensor's name in `adapter_model.safetensors`, as `peft` writes it."""


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
        """This tensor's part of a vector laid out like the adapter's."""
        return vector[self.begin : self.end].view(self.shape)


class Adapter:
    """One run's adapter.

    Attributes:
        name: unique among the model's adapters.
        settings: its rank, scale, dropout and targets.
        slots: its tensors, in the order of the vector.
        weights: float32 [P], what the optimizer steps.
    """

    def __init__(self, name: str, settings: LoraSettings, slots: list[Slot], device: str) -> None:
        self.name = name
        self.settings = settings
        self.slots = slots
        self.weights = nn.Parameter(torch.zeros(slots[-1].end, device=device))
        self.tensors: list[nn.Parameter] = []
        self._gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """float32 [P]: where backward passes add; made when first asked for."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.weights)
            for slot, tensor in zip(self.slots, self.tensors, strict=True):
                tensor.grad = slot.view(self._gradient)
        return self._gradient

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


class AdapterPool:
    """Adds, removes and switches the adapters of one model."""

    def __init__(self, module: nn.Module, scope: DropoutScope, device: str) -> None:
        self._module = module
        self._scope = scope
        self._device = device
        self._numbers = itertools.count(1)
        self._adapters: dict[str, Adapter] = {}
        self._layers: list[LoraLayer] = []
        self._active: str | None = None

    def add(self, settings: LoraSettings) -> Adapter:
        """Puts a new adapter, all zero, beside the others."""
        name = f"adapter{next(self._numbers)}"
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=list(settings.target_modules),
            bias="none",
        )
        with warnings.catch_warnings():
            # It warns of several adapters on one model, which is the point.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            peft.inject_adapter_in_model(config, self._module, name, low_cpu_mem_usage=True)
        try:
            adapter = self._bind(name, settings)
        except BaseException:
            self._delete(name)
            raise
        self._adapters[name] = adapter
        # peft has frozen the other adapters and made the new one active; we say whose turn it is.
        for other in self._adapters.values():
            for tensor in other.tensors:
                tensor.requires_grad_(True)
        self.activate(None)
        return adapter

    def _bind(self, name: str, settings: LoraSettings) -> Adapter:
        layers = list(self._named_layers())
        self._layers = [layer for _, layer in layers]
        mine = [(module, layer) for module, layer in layers if name in layer.lora_A]
        slots: list[Slot] = []
        begin = 0
        for module, layer in mine:
            for side in ("lora_A", "lora_B"):
                shape = tuple(getattr(layer, side)[name].weight.shape)
                slots.append(Slot(_KEY.format(module=module, side=side), module, shape, begin))
                begin = slots[-1].end
        adapter = Adapter(name, settings, slots, self._device)
        views = iter(slots)
        for module, layer in mine:
            for side in ("lora_A", "lora_B"):
                tensor = nn.Parameter(next(views).view(adapter.weights.detach()))
                getattr(layer, side)[name].weight = tensor
                adapter.tensors.append(tensor)
            if settings.dropout > 0:
                layer.lora_dropout[name] = CounterDropout(settings.dropout, module, self._scope)
        return adapter

    def remove(self, adapter: Adapter) -> None:
        """Takes an adapter out of the model."""
        del self._adapters[adapter.name]
        self._delete(adapter.name)

    def _delete(self, name: str) -> None:
        self._layers = [layer for _, layer in self._named_layers()]
        # peft would warn, and make another run's adapter active instead.
        self.activate(None)
        for layer in self._layers:
            if name in layer.lora_A:
                layer.delete_adapter(name)
        configs: Any = self._module.peft_config
        configs.pop(name, None)
        self.activate(None)

    def activate(self, adapter: Adapter | None) -> None:
        """Makes the model's passes go through this adapter, or through none."""
        name = None if adapter is None else adapter.name
        if name == self._active and name is not None:
            return
        # set_adapter would also walk over every parameter to freeze and unfreeze.
        active = [] if name is None else [name]
        for layer in self._layers:
            layer._active_adapter = active
        self._active = name

    def _named_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        for name, module in self._module.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module


def _mismatch(text: str) -> TenSafeFault:
    return TenSafeFault(
        "ARTIFACT_MISMATCH",
        f"the artifact does not fit: {text}; load it into a run with the same model, rank and "
        "target_modules",
        field="artifact_id",
    )
