"""A run that only writes down what it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensafe_client import Datum, Sample, TrainingConfig


@dataclass
class Done:
    """A future that has ended."""

    value: Any

    def result(self) -> Any:
        return self.value

    def cancel(self) -> bool:
        return True


@dataclass
class Passed:
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    tokens_processed: int = 1
    reductions: dict[str, str] = field(default_factory=dict)


@dataclass
class Stepped:
    step: int
    grad_norm: float = 1.0
    learning_rate: float = 0.1
    applied: bool = True


@dataclass
class Saved:
    artifact_id: str


@dataclass
class Sampled:
    samples: list[Sample]
    model_step: int


@dataclass
class Here:
    """A session whose coroutines are values."""

    @property
    def io(self) -> Here:
        return self

    def run(self, value: Any) -> Any:
        return value


@dataclass
class Run:
    """Notes each call, and what update it belongs to.

    Attributes:
        sampled, passed, stepped: options of each call.
        samples: every completion, in order: two tokens, the first of which tells its place, and
            every third cut by `max_tokens`.
    """

    log: list[str] = field(default_factory=list)
    learned: list[list[Datum]] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)
    passed: list[dict[str, Any]] = field(default_factory=list)
    stepped: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    step: int = 0
    run_id: str = "run-1"
    metadata: dict[str, Any] = field(default_factory=dict)
    config: TrainingConfig = field(default_factory=lambda: TrainingConfig("mock"))
    _session: Here = field(default_factory=Here)
    _open: list[Datum] = field(default_factory=list)

    def sample_async(self, prompts: Sequence[Sequence[int]], **options: Any) -> Done:
        self.sampled.append(options)
        begin = len(self.samples)
        for index, prompt in enumerate(prompts):
            for which in range(options["num_samples"]):
                self.samples.append(_sample(len(self.samples), index, which, len(prompt)))
        return Done(Sampled(self.samples[begin:], self.step))

    def forward_backward(self, batch: Sequence[Datum], **options: Any) -> Done:
        assert options["reduction"] == "sum"
        self.passed.append(options)
        self._open += batch
        return Done(Passed(loss=len(batch)))

    def optim_step(self, **options: Any) -> Done:
        self.stepped.append(options)
        self.learned.append(self._open)
        self._open = []
        self.step += 1
        self.log.append(f"update {self.step}")
        return Done(Stepped(self.step))

    def save_state(self, **options: Any) -> Saved:
        self.log.append("save")
        self.metadata = json.loads(json.dumps(options["metadata"]))
        return Saved(f"art-{self.step}")


def _sample(place: int, prompt: int, which: int, prompt_tokens: int) -> Sample:
    return Sample(
        prompt="",
        completion=str(place),
        tokens_generated=2,
        finish_reason="length" if place % 3 == 0 else "stop",
        prompt_index=prompt,
        prompt_tokens=prompt_tokens,
        sample_index=which,
        tokens=np.asarray([100 + place, 7], np.int32),
        logprobs=np.asarray([-1 - place, -0.125], np.float32),
        raw_logprobs=np.asarray([-2 - place, -0.25], np.float32),
    )
