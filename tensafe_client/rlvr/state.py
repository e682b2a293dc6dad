"""What a trainer must remember, beside the run's own state, to go on: kept with its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensafe_client.errors import ConfigError
from tensafe_client.rlvr.advantages import MovingAverage
from tensafe_client.rlvr.config import RLVRConfig

KEY = "rlvr"
# `eval_every` and `checkpoint_every` decide where nothing is sampled ahead, and so what is learned.
_MAY_CHANGE = frozenset({"iterations", "reward_processes", "reward_timeout_s"})


@dataclass
class TrainerState:
    """Where a training is.

    Attributes:
        iteration: batches that were learned from.
        next_batch: number of the next batch to sample.
        average: the baseline of that name.
        task: what names the environment, as its maker likes.
    """

    iteration: int
    next_batch: int
    average: MovingAverage
    task: Mapping[str, str | int] = field(default_factory=dict)

    @classmethod
    def fresh(cls, config: RLVRConfig, task: Mapping[str, str | int] | None = None) -> TrainerState:
        """Before the first iteration."""
        decay = 0.9 if config.baseline_decay is None else config.baseline_decay
        return cls(0, 0, MovingAverage(decay), dict(task or {}))

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Any],
        config: RLVRConfig,
        task: Mapping[str, str | int] | None = None,
    ) -> TrainerState:
        """What `metadata` gave for a checkpoint.

        Raises:
            ConfigError: if it is none of RLVR's, or of another configuration or task.
        """
        if not is_checkpoint(metadata):
            raise ConfigError.of("resume", "names an artifact that no RLVR training has saved")
        saved = metadata[KEY]
        now = _plain(config)
        for name, value in saved["config"].items():
            if name not in _MAY_CHANGE and now.get(name) != value:
                raise ConfigError.of(
                    name,
                    f"is {now.get(name)!r}, and was {value!r} when the checkpoint was saved",
                    remedy="resume with the same configuration, or begin a new training from the "
                    "artifact (from_artifact)",
                )
        state = cls.fresh(config, task)
        for name, value in saved.get("task", {}).items():
            if name in state.task and state.task[name] != value:
                raise ConfigError.of(
                    name,
                    f"is {state.task[name]!r}, and was {value!r} when the checkpoint was saved",
                    remedy="resume with the same task, or begin a new training from the artifact "
                    "(from_artifact)",
                )
        state.iteration = int(saved["iteration"])
        state.next_batch = int(saved["next_batch"])
        state.average.total = float(saved["average"]["total"])
        state.average.weight = float(saved["average"]["weight"])
        return state

    def metadata(self, config: RLVRConfig) -> dict[str, Any]:
        """What is kept with a checkpoint."""
        return {
            KEY: {
                "iteration": self.iteration,
                "next_batch": self.next_batch,
                "average": {"total": self.average.total, "weight": self.average.weight},
                "config": _plain(config),
                "task": dict(self.task),
            }
        }


def is_checkpoint(metadata: Mapping[str, Any]) -> bool:
    """Whether an artifact's metadata is that of a checkpoint."""
    return isinstance(metadata.get(KEY), Mapping)


def seed_of(metadata: Mapping[str, Any]) -> int:
    """The seed of the training that saved a checkpoint."""
    return int(metadata[KEY]["config"]["seed"])


def _plain(config: RLVRConfig) -> dict[str, Any]:
    """As JSON gives it back."""
    values = dataclasses.asdict(config)
    if values["stop"] is not None:
        values["stop"] = list(values["stop"])
    return values
