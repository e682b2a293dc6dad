"""Configuration of a run: what `create_training_client` takes.

Every class remembers which fields were given. What was not given stays unset on the wire, so that
the server fills in its default, and what was given is refused if it has no effect (`betas` with
`sgd`). Use `replace` to change a field: `dataclasses.replace` counts every field as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensafe.v1 import training_pb2 as pb
from tensafe_client.checks import (
    check_bool,
    check_count,
    check_number,
    check_pair,
    check_string,
    check_strings,
)
from tensafe_client.dp_config import DPConfig
from tensafe_client.errors import ConfigError
from tensafe_client.given import Given, present


@dataclass(frozen=True)
class LoRAConfig(Given):
    """LoRA adapter (Hu et al. 2021, arXiv 2106.09685): W + (alpha / rank)·B·A.

    Attributes:
        rank: rank r of A and B.
        alpha: scale; the adapter's product is multiplied by alpha / rank.
        dropout: probability of zeroing an input of A in forward_backward.
        target_modules: linear modules to adapt, by the last part of their name.
        bias: bias handling; only "none" is taken, since the base model is shared.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj", "k_proj", "o_proj"]
    )
    bias: str = "none"

    def __post_init__(self) -> None:
        self._check("rank", check_count)
        self._check("alpha", check_number)
        self._check("dropout", check_number)
        self._check("target_modules", check_strings)
        self._check("bias", check_string)
        if not self.target_modules:
            raise ConfigError.of("LoRAConfig.target_modules", "must name at least one module")

    def to_proto(self) -> pb.LoraConfig:
        """Packs the given fields."""
        return pb.LoraConfig(
            **{name: getattr(self, name) for name in self._given if getattr(self, name) is not None}
        )

    @classmethod
    def from_proto(cls, message: pb.LoraConfig) -> LoRAConfig:
        """Unpacks the set fields."""
        values = present(message, "rank", "alpha", "dropout", "bias")
        if message.target_modules:
            values["target_modules"] = list(message.target_modules)
        return cls(**values)


@dataclass(frozen=True)
class OptimizerConfig(Given):
    """Optimizer of a run. An option that the named optimizer lacks is refused by the server.

    Attributes:
        name: "adamw", "adam" or "sgd".
        learning_rate: step size; `optim_step` may override it per call.
        weight_decay: decoupled (adamw) or L2 (adam, sgd).
        betas: decay of the first and second moment; adamw and adam only.
        eps: added to the denominator; adamw and adam only.
        momentum: sgd only. None: 0.
        grad_clip_norm: clips the applied gradient to this L2 norm. None: no clipping.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float | None = None
    grad_clip_norm: float | None = None

    def __post_init__(self) -> None:
        self._check("name", check_string)
        self._check("betas", check_pair)
        for name in ("learning_rate", "weight_decay", "eps", "momentum", "grad_clip_norm"):
            self._check(name, check_number)

    def to_proto(self) -> pb.OptimizerConfig:
        """Packs the given fields."""
        message = pb.OptimizerConfig(
            **{
                name: getattr(self, name)
                for name in self._given - {"betas"}
                if getattr(self, name) is not None
            }
        )
        if self.given("betas") and self.betas is not None:
            message.beta1, message.beta2 = self.betas
        return message

    @classmethod
    def from_proto(cls, message: pb.OptimizerConfig) -> OptimizerConfig:
        """Unpacks the set fields."""
        scalars = ("name", "learning_rate", "weight_decay", "eps", "momentum", "grad_clip_norm")
        values = present(message, *scalars)
        if message.HasField("beta1") and message.HasField("beta2"):
            values["betas"] = (message.beta1, message.beta2)
        return cls(**values)


_SCALARS = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "seed",
    "name",
    "deterministic",
)


@dataclass(frozen=True)
class TrainingConfig(Given):
    """Everything that defines a run.

    Attributes:
        model_ref: a registered model's name or reference (`client.models()`).
        lora_config: the adapter. None: LoRA with its defaults.
        optimizer: the optimizer.
        dp_config: differential privacy. None: none.
        batch_size: examples in one batch, as the data helpers make them.
        gradient_accumulation_steps: N: `optim_step` applies on every N-th call.
        max_steps: applied updates after which `optim_step` fails. None: no limit.
        seed: fixes adapter initialisation, dropout and sampling. None: the server draws one.
        name: free text for people.
        deterministic: whether equal batches give equal bits, whoever else shares the worker; its
            operations then never execute together with another run's, which costs throughput.
    """

    model_ref: str
    lora_config: LoRAConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dp_config: DPConfig | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    seed: int | None = None
    name: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        self._check("model_ref", check_string)
        self._nest("lora_config", LoRAConfig)
        self._nest("optimizer", OptimizerConfig)
        self._nest("dp_config", DPConfig)
        self._check("batch_size", check_count)
        self._check("gradient_accumulation_steps", check_count)
        self._check("max_steps", check_count, bits=64)
        self._check("seed", check_count, bits=64)
        self._check("name", check_string)
        self._check("deterministic", check_bool)
        if self.optimizer is None:
            raise ConfigError.of(
                "TrainingConfig.optimizer", "must not be None; leave it out for AdamW"
            )

    @classmethod
    def of(cls, config: TrainingConfig | Mapping[str, Any]) -> TrainingConfig:
        """Takes what `create_training_client` takes: a config or a dict."""
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        raise ConfigError.of("config", f"must be a dict or a TrainingConfig, got {config!r}")

    def to_proto(self) -> pb.RunConfig:
        """Packs the given fields."""
        message = pb.RunConfig(model_ref=self.model_ref)
        if self.lora_config is not None:
            message.lora.CopyFrom(self.lora_config.to_proto())
        if self.given("optimizer"):
            message.optimizer.CopyFrom(self.optimizer.to_proto())
        if self.dp_config is not None:
            message.dp.CopyFrom(self.dp_config.to_proto())
        for name in _SCALARS:
            if self.given(name) and getattr(self, name) is not None:
                setattr(message, name, getattr(self, name))
        return message

    @classmethod
    def from_proto(cls, message: pb.RunConfig) -> TrainingConfig:
        """Unpacks the set fields."""
        values = present(message, *_SCALARS)
        if message.HasField("lora"):
            values["lora_config"] = LoRAConfig.from_proto(message.lora)
        if message.HasField("optimizer"):
            values["optimizer"] = OptimizerConfig.from_proto(message.optimizer)
        if message.HasField("dp"):
            values["dp_config"] = DPConfig.from_proto(message.dp)
        return cls(model_ref=message.model_ref, **values)
