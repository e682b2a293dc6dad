"""What a backend is asked to do and what it answers, free of protos and gRPC.

Shapes: N tokens of a batch end to end, B datums, P tokens of a prompt, T sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe.wire.losses import Reduction

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class Combine(IntEnum):
    """How values of one metric combine; numbered as `tensafe.v1.Reduction`."""

    SUM = 1
    MEAN = 2
    MIN = 3
    MAX = 4
    LAST = 5


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A LoRA adapter: W + (alpha / rank)·B·A (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "k_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """An optimizer; the fields that the named one lacks are None."""

    name: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta1: float | None = 0.9
    beta2: float | None = 0.999
    eps: float | None = 1e-8
    momentum: float | None = None
    grad_clip_norm: float | None = None

    def adam(self) -> tuple[float, float, float]:
        """β1, β2 and ε.

        Raises:
            ValueError: one is missing.
        """
        if self.beta1 is None or self.beta2 is None or self.eps is None:
            raise ValueError(f"{self.name} needs beta1, beta2 and eps")
        return self.beta1, self.beta2, self.eps


class PrivateMetrics(StrEnum):
    """What a private run tells its owner."""

    PRIVATE = "private"
    RAW_TO_OWNER = "raw_to_owner"


@dataclass(frozen=True, slots=True)
class PrivacySettings:
    """Differentially private training: DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    Attributes:
        noise_multiplier: σ ≥ 0; a step's noise is N(0, (σ·C)²) in each number.
        max_grad_norm: C > 0, bound on the L2 norm of one unit's gradient over the whole adapter.
        expected_batch_size: units that a step's noised sum is divided by, whatever it has.
        metrics: `private` tells what was noised and what is public, and nothing else.
        loss_noise_multiplier: of the noise on a step's sum of losses, over `max_loss`; None: no
            loss is told.
        max_loss: to which a unit's loss is clipped for that, from 0.
        test_seed: where noise comes from in tests, which make no run private; None: from the
            operating system, anew for each step.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    metrics: PrivateMetrics = PrivateMetrics.PRIVATE
    loss_noise_multiplier: float | None = None
    max_loss: float = 10.0
    test_seed: int | None = None

    @property
    def tells_raw(self) -> bool:
        """Whether the owner is told what was not noised."""
        return self.metrics is PrivateMetrics.RAW_TO_OWNER


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Everything that defines a run, defaults filled in."""

    model_ref: str
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    accumulation_steps: int = 1
    max_steps: int | None = None
    seed: int = 0
    deterministic: bool = False
    privacy: PrivacySettings | None = None

    def as_json(self) -> dict[str, Any]:
        """As it stands in a checkpoint's `state.json`."""
        return asdict(self)


@dataclass(slots=True)
class Batch:
    """Datums end to end: datum b is rows offsets[b] to offsets[b + 1] of each per-token array.

    Attributes:
        offsets: int64 [B + 1].
        input_tokens: int32 [N].
        target_tokens: int32 [N] or [N, K], the token to predict at each position; None if not
            given.
        weights: float32, like the targets, 0 where nothing is scored; None for all 1.
        inputs: what else the loss takes, by name: [N] or [N, K].
        units: int32 [B], of private runs: the number of each datum's unit in this batch, from 0;
            −1: the datum adds nothing. None: each datum is a unit of its own.
    """

    offsets: Int64
    input_tokens: Int32
    target_tokens: Int32 | None = None
    weights: Float32 | None = None
    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    units: Int32 | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it has no datum, as that of a private run may."""
        return len(self.offsets) == 1

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All that the loss is given, by name."""
        own = {"target_tokens": self.target_tokens, "weights": self.weights}
        return {name: array for name, array in own.items() if array is not None} | self.inputs


@dataclass(frozen=True, slots=True)
class ArtifactWeights:
    """Weights of a saved artifact whose files lie in `directory`."""

    artifact_id: str
    directory: Path


@dataclass(frozen=True, slots=True)
class Reference:
    """What a loss compares the run with: `base`, `none` or, with `artifact`, `artifact_id`."""

    source: str
    artifact: ArtifactWeights | None = None


@dataclass(slots=True)
class LossRequest:
    """A forward pass, or a forward and a backward pass, over one batch.

    Attributes:
        reduction: None for the loss's own; in private runs the sequence mean.
        options: of the loss; what is left out has its default.
        reference: None for the base model, where the loss needs one.
        dropout: whether a forward pass has the masks of the next backward pass.
    """

    batch: Batch
    loss: str = "cross_entropy"
    reduction: Reduction | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    reference: Reference | None = None
    dropout: bool = False


@dataclass(slots=True)
class StepRequest:
    """Closes a call of the accumulation window; None means the run's own value.

    Attributes:
        charged: what an update of a private run costs is written down. Without it none is applied.
        closes: it closes the window, however many calls that has had.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None
    charged: bool = False
    closes: bool = False


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue: exactly one of the three is set."""

    text: str | None = None
    tokens: Int32 | None = None
    chat: tuple[ChatMessage, ...] | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends a completion beside its model's end tokens. Empty: nothing but its length does.

    Attributes:
        strings: the completion's text ends before the first of them.
        tokens: ids; the text leaves them out.
    """

    strings: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token, and what is told of it.

    Attributes:
        max_tokens: most sampled tokens, the one that ends a completion among them.
        top_k: 0 for all tokens.
        seed: None: from the run's seed and the operation.
        stop: None: at the model's end tokens.
        top_logprobs: k, how many of the likeliest tokens to tell at each position.
        prompt_logprobs: whether to tell the log-probabilities of the prompt's tokens.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Stop | None = None
    num_samples: int = 1
    top_logprobs: int = 0
    prompt_logprobs: bool = False


@dataclass(slots=True)
class SampleRequest:
    """Generates text.

    Attributes:
        run_id: the run whose weights, or whose saved version, is meant; None without a run.
        model_ref: the base model of an operation without run, else empty.
        artifact: sample from these; None for the run's weights or, without run, the base model.
        stream: tell of new tokens as they come.
    """

    prompts: list[Prompt]
    params: SamplingParams
    run_id: str | None = None
    model_ref: str = ""
    artifact: ArtifactWeights | None = None
    stream: bool = False


@dataclass(slots=True)
class Metric:
    """One measured number; `weight` counts under `Combine.MEAN` only."""

    name: str
    value: float
    combine: Combine
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """What a loss tells: float32 [N] or [N, K], or [B] if it is `per_datum`; 0 where nothing is
    scored."""

    values: Float32
    per_datum: bool = False


@dataclass(slots=True)
class LossOutcome:
    """What came of a pass.

    Attributes:
        outputs: by name; `logprobs`, of each target token, is always there, unless the run is
            private and tells nothing raw.
    """

    metrics: list[Metric]
    outputs: dict[str, Output]

    @property
    def logprobs(self) -> Float32:
        """float32 [N] or [N, K]: of each target token, 0 where the weight is 0."""
        return self.outputs["logprobs"].values


@dataclass(slots=True)
class PrivateRelease:
    """What an applied step of a private run may tell beside its noised gradient's norm.

    Attributes:
        noise_applied: whether noise was added; False under a noise multiplier of 0.
        num_clipped: units whose gradient was clipped; None unless raw metrics are told.
        noised_loss: Σ clipped losses + noise, over the expected batch size; None if not asked for.
    """

    noise_applied: bool
    num_clipped: int | None = None
    noised_loss: float | None = None


@dataclass(slots=True)
class StepOutcome:
    """Result of one `optim_step`; `metrics` only if it applied, `release` only if that was an
    update of a private run."""

    step: int
    applied: bool
    learning_rate: float
    grad_norm: float | None = None
    metrics: list[Metric] = field(default_factory=list)
    release: PrivateRelease | None = None


class FinishReason(StrEnum):
    """Why a completion ended: an end or stop token or a stop string; or a limit of length."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(slots=True)
class Completion:
    """One completion.

    `tokens` are all that were sampled. If a token ended it, that one is the last, since its choice
    was part of the policy; if a stop string did, the last is the one that completed the string.
    `text` has neither the token nor the string. So T is at least 1.

    Attributes:
        prompt: as the model read it.
        tokens: int32 [T].
        logprobs: float32 [T], of each under the distribution sampled from, after temperature and
            filters; 0 at temperature 0.
        raw_logprobs: float32 [T], log softmax of the model's own logits: what FORWARD computes.
        prompt_tokens: P.
        top_tokens, top_logprobs: int32 and float32 [T, k], the likeliest first, by the model's own
            logits; None unless asked for.
        prompt_logprobs: float32 [P], raw, of each token of the prompt given those before; NaN for
            the first. The same array for all samples of a prompt; None unless asked for.
    """

    prompt_index: int
    prompt: str
    text: str
    tokens: Int32
    logprobs: Float32
    raw_logprobs: Float32
    finish_reason: FinishReason
    prompt_tokens: int
    top_tokens: Int32 | None = None
    top_logprobs: Float32 | None = None
    prompt_logprobs: Float32 | None = None

    @property
    def stopped(self) -> bool:
        """Whether it ended by itself."""
        return self.finish_reason is FinishReason.STOP


@dataclass(frozen=True, slots=True)
class SampleChunk:
    """What one completion has more than its chunk before.

    Chunks of a completion come in order and add up to it, tokens and text. Text lags behind tokens
    where it may still change or be cut: an unfinished character, or what could become a stop
    string. A sample that begins anew on another worker begins at position 0 again.

    Attributes:
        sample: which of the prompt's samples, from 0.
        position: tokens of the completion before this chunk.
        tokens: int32 [n], as in `Completion`; n is 0 if only text was still to come.
        logprobs, raw_logprobs: float32 [n].
    """

    operation_id: str
    prompt_index: int
    sample: int
    position: int
    tokens: Int32
    logprobs: Float32
    raw_logprobs: Float32
    text: str


@dataclass(slots=True)
class SampleOutcome:
    """Completions, for each prompt in order.

    Attributes:
        model_step: applied updates of the weights; 0 for a base model.
        compute_ms: its share of the time of the steps that it was part of.
    """

    completions: list[Completion]
    model_step: int = 0
    compute_ms: float = 0.0


@dataclass(slots=True)
class SaveOutcome:
    """What was written: the applied updates of the weights, and the base model's name."""

    step: int
    model_ref: str


@dataclass(slots=True)
class LoadOutcome:
    """The run's applied updates from now on, and whether all of its state was replaced."""

    step: int
    optimizer_restored: bool


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A base model as it is registered with the coordinator.

    Attributes:
        dtype: `float32` or `bfloat16`; empty for the mock.
        linear_modules: last part of a linear module's name → how many the model has.
        tokenizer_files: name → content.
        accepts_any_reference: serves every model_ref (the mock).
    """

    name: str
    references: tuple[str, ...] = ()
    architecture: str = ""
    parameters: int = 0
    vocabulary_size: int = 0
    context_length: int = 0
    dtype: str = ""
    linear_modules: Mapping[str, int] = field(default_factory=dict)
    has_chat_template: bool = False
    tokenizer_sha256: str = ""
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict)
    accepts_any_reference: bool = False
