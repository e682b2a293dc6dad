"""Which models exist, by name and by reference, and which configurations they take."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Mapping

from tensafe.v1 import training_pb2 as training
from tensafe.v1.models_pb2 import Model
from tensafe.wire.loss_messages import card_of
from tensafe.wire.losses import LossCard
from tensafe.wire.status import TenSafeFault
from tensafe_server.blobs.base import BlobStore
from tensafe_server.store.base import Store

DEFAULT_TARGET_MODULES = ("q_proj", "v_proj", "k_proj", "o_proj")
_ADAM_OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_OPTIMIZER_OPTIONS: dict[str, dict[str, float]] = {
    "adamw": _ADAM_OPTIONS,
    "adam": _ADAM_OPTIONS,
    "sgd": {"momentum": 0.0},
}


class ModelRegistry:
    """The registered models. They outlive the workers that run them."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        self._store = store
        self._blobs = blobs
        self._models: dict[str, Model] = {}
        self._losses: dict[str, dict[str, LossCard]] = {}

    async def load(self) -> None:
        for model in await self._store.models():
            self._take(model)

    def _take(self, model: Model) -> None:
        self._losses[model.name] = {loss.name: card_of(loss) for loss in model.losses}
        del model.losses[:]
        self._models[model.name] = model

    def models(self) -> list[Model]:
        return [self._models[name] for name in sorted(self._models)]

    def losses(self, name: str) -> Mapping[str, LossCard]:
        """What may be minimised on the model of this name; empty if its worker never said."""
        return self._losses.get(name, {})

    def find(self, reference: str, field: str = "model_ref") -> Model:
        """The model of a registered name or reference.

        Raises:
            TenSafeFault: MODEL_NOT_FOUND; a path is no reference, whatever lies there.
        """
        model = self._models.get(reference)
        if model is not None:
            return model
        for model in self._models.values():
            if reference in model.references:
                return model
        for model in self._models.values():
            if model.accepts_any_reference:
                return model
        names = ", ".join(sorted(self._models)) or "none"
        raise TenSafeFault(
            "MODEL_NOT_FOUND",
            f"no model is registered as {reference!r}; registered: {names}. An operator registers "
            "one with `tensafe up --model` or `tensafe worker --model`",
            field=field,
            model_ref=reference,
        )

    async def publish(self, model: Model, files: dict[str, bytes]) -> None:
        """Registers a model with its losses, and its tokenizer's files."""
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n".encode())
        if files:
            model.tokenizer_sha256 = digest.hexdigest()
            await asyncio.to_thread(self._put_files, model.tokenizer_sha256, files)
        await self._store.put_model(model)
        self._take(model)

    def _put_files(self, digest: str, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            self._blobs.put(f"tokenizers/{digest}/{name}", data)
        self._blobs.put(f"tokenizers/{digest}/index", "\n".join(sorted(files)).encode())

    def tokenizer_files(self, model: Model) -> list[tuple[str, str]]:
        """(file name, blob key) of each of a model's tokenizer files."""
        if not model.tokenizer_sha256:
            return []
        prefix = f"tokenizers/{model.tokenizer_sha256}"
        names = self._blobs.get(f"{prefix}/index").decode().split("\n")
        return [(name, f"{prefix}/{name}") for name in names]

    def resolve_config(self, config: training.RunConfig) -> training.RunConfig:
        """A run's configuration with the model by its name and every default filled in, but those
        of `dp`.

        Raises:
            TenSafeFault: MODEL_NOT_FOUND, UNKNOWN_TARGET_MODULE or UNSUPPORTED_OPTION.
        """
        resolved = training.RunConfig()
        resolved.CopyFrom(config)
        model = self.find(config.model_ref, field="config.model_ref")
        if not model.accepts_any_reference:
            resolved.model_ref = model.name
        _fill_lora(resolved.lora, model)
        _fill_optimizer(resolved.optimizer)
        if not config.HasField("batch_size"):
            resolved.batch_size = 8
        if not config.HasField("gradient_accumulation_steps"):
            resolved.gradient_accumulation_steps = 1
        if not config.HasField("seed"):
            resolved.seed = secrets.randbits(63)
        resolved.deterministic = config.deterministic
        return resolved


def _fill_lora(lora: training.LoraConfig, model: Model) -> None:
    if not lora.HasField("rank"):
        lora.rank = 16
    if not lora.HasField("alpha"):
        lora.alpha = 32.0
    if not lora.HasField("dropout"):
        lora.dropout = 0.05
    if not lora.HasField("bias"):
        lora.bias = "none"
    if not lora.target_modules:
        lora.target_modules.extend(DEFAULT_TARGET_MODULES)
    known = {module.name for module in model.linear_modules}
    unknown = [name for name in lora.target_modules if name not in known]
    if known and unknown:
        raise TenSafeFault(
            "UNKNOWN_TARGET_MODULE",
            f"{model.name} has no linear module {unknown[0]!r}; it has {', '.join(sorted(known))}",
            field="config.lora.target_modules",
            model_ref=model.name,
        )


def _fill_optimizer(optimizer: training.OptimizerConfig) -> None:
    if not optimizer.HasField("name"):
        optimizer.name = "adamw"
    if not optimizer.HasField("learning_rate"):
        optimizer.learning_rate = 1e-4
    if not optimizer.HasField("weight_decay"):
        optimizer.weight_decay = 0.01
    options = _OPTIMIZER_OPTIONS[optimizer.name]
    for name in ("beta1", "beta2", "eps", "momentum"):
        if name in options:
            if not optimizer.HasField(name):
                setattr(optimizer, name, options[name])
        elif optimizer.HasField(name):
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"{optimizer.name} has no option {name}; leave it out, or choose an optimizer "
                "that has it",
                field=f"config.optimizer.{name}",
            )
