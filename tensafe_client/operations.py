"""The operations of one run, as futures: what the sync and the asyncio client share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from tensafe.v1.training_pb2 import OperationSpec
from tensafe_client import sampling, specs
from tensafe_client.config import TrainingConfig
from tensafe_client.custom_loss import (
    CustomBatch,
    Logprobs,
    LossFunction,
    LossValue,
    evaluate,
)
from tensafe_client.data.batches import EncodedBatch, encode_batch, encode_private_batch
from tensafe_client.errors import ConfigError, TenSafeError
from tensafe_client.futures import OperationFuture
from tensafe_client.infos import RunInfo
from tensafe_client.results import (
    ForwardBackwardResult,
    ForwardResult,
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
)
from tensafe_client.samples import SampleResult
from tensafe_client.sampling import RunSampling
from tensafe_client.sequence import Place, RunSequence
from tensafe_client.session import Session
from tensafe_client.submission import check_size


class RunOperations:
    """Submits a run's operations; none of these methods waits for the network.

    Operations are numbered as they are submitted and run in that order, however many are in flight.
    """

    def __init__(self, session: Session, info: RunInfo, sequence: RunSequence) -> None:
        self._session = session
        self._info = info
        self._sequence = sequence

    @property
    def run_id(self) -> str:
        """The run, `run-…`."""
        return self._info.id

    @property
    def id(self) -> str:
        """The run, `run-…`."""
        return self._info.id

    @property
    def config(self) -> TrainingConfig:
        """The run's configuration, every default filled in by the server."""
        return self._info.config

    @property
    def info(self) -> RunInfo:
        """The run as the server last described it; `refresh()` asks again."""
        return self._info

    @property
    def status(self) -> str:
        """ "active" or "deleted", as the server last said; `refresh()` asks again."""
        return self._info.status

    @property
    def step(self) -> int:
        """Applied updates, as of the newest result or `refresh()` that this client has seen."""
        return self._sequence.step

    def forward(
        self,
        batch: Any,
        loss_fn: str = "cross_entropy",
        reduction: str | None = None,
        *,
        loss_config: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
    ) -> OperationFuture[ForwardResult]:
        """Computes a loss and its per-token outputs, without dropout and without any gradient.

        Args:
            batch: as for `forward_backward`.
            loss_fn, reduction, loss_config: as for `forward_backward`.
            deadline_s: how long it may wait on the server, seconds: if it has not started by then,
                it never runs and ends with DeadlineExceededError. None: for ever.

        Raises:
            BatchError: if the batch is malformed; nothing is submitted.
        """
        encoded = self._encoded(batch)
        loss = specs.loss_config(loss_fn, loss_config, reduction)
        spec = specs.forward(self.run_id, encoded, loss)
        specs.set_deadline(spec, deadline_s)
        return self._session.submit_numbered(self._sequence, "forward", spec, encoded.offsets)

    def forward_backward(
        self,
        batch: Any,
        loss_fn: str = "cross_entropy",
        reduction: str | None = None,
        *,
        loss_config: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
    ) -> OperationFuture[ForwardBackwardResult]:
        """Computes a loss and adds its gradient to the run's accumulator.

        Args:
            batch: a mapping as a Hugging Face data loader yields (`input_ids`, `labels`, maybe
                `attention_mask`, each [B, T] as lists, NumPy or torch; labels aligned with the
                inputs, −100 ignored, shifted inside; maybe `unit_id`, B texts), or a list of
                `Datum`, in a private run maybe an empty one.
            loss_fn: name of the loss; `client.losses()` lists what each takes.
            reduction: "token_mean", "sequence_mean" or "sum"; one accumulation window has one.
                None: the loss's own, for most the token mean.
            loss_config: the loss's options, such as `{"clip_low": 0.8}`, and `reference` for what
                it compares with: "base" (the default), or the id of an artifact.
            deadline_s: how long it may wait on the server, seconds: if it has not started by then,
                it never runs, ends with DeadlineExceededError and poisons its window. None: for
                ever.

        A call that raises counts as a failed forward_backward, as one does that the server refuses:
        it takes its place in the run's order, and the `optim_step` that closes this accumulation
        window fails with `WindowPoisonedError` instead of stepping on half a gradient.

        Raises:
            BatchError: if the batch is malformed.
            MessageTooLargeError: if it is larger than one request may be.
        """
        try:
            encoded = self._encoded(batch)
            loss = specs.loss_config(loss_fn, loss_config, reduction)
            spec = specs.forward_backward(self.run_id, encoded, loss)
            specs.set_deadline(spec, deadline_s)
            return self._session.submit_numbered(
                self._sequence, "forward_backward", spec, encoded.offsets
            )
        except Exception:
            self._poison_window()
            raise

    def forward_backward_custom(
        self,
        batch: Any,
        fn: LossFunction,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[ForwardBackwardResult]:
        """Adds the gradient of a loss of your own, which is computed in this process.

            def loss(logprobs):
                return -sum(lp.sum() for lp in logprobs.torch())

            future = tc.forward_backward_custom(batch, loss)

        Two operations, one after the other in the run's order: a forward pass with the dropout
        masks of the next backward pass, whose log-probabilities `fn` gets, and the backward pass
        of what it gives. Operations that are submitted meanwhile keep their places behind them.

        Args:
            batch: as for `forward_backward`; a datum's further inputs are not sent, and its weights
                only say which targets are scored.
            fn: called once, on a thread of the SDK's, with `Logprobs`: for each datum a NumPy
                array of its targets' log-probabilities, or with `.torch()` tensors. In torch it
                returns the loss, or (loss, metrics); in NumPy (loss, gradients), or (loss,
                gradients, metrics), with an array like the log-probabilities for each datum. What
                they hold at targets that are not scored has no effect.
            deadline_s: as for `forward_backward`, of each of the two.

        The window has the `sum` reduction: the loss is what `fn` says, divided by nothing. The
        result has that loss and those metrics, whose names must be none of the service's (`loss`,
        `grad_norm`, `tokens`, `scored_tokens`). If `fn` raises, the future raises the same; as with
        every forward_backward that fails, nothing was added, and the `optim_step` that closes the
        window fails with `WindowPoisonedError`.

        Raises:
            BatchError: if the batch is malformed.
            MessageTooLargeError: if it is larger than one request may be.
        """
        try:
            if not callable(fn):
                raise ConfigError.of("fn", f"must be a function, got {fn!r}")
            custom = CustomBatch(self._encoded(batch))
            check_size("forward_backward", custom.backward_bytes)
            spec = custom.forward(self.run_id)
            specs.set_deadline(spec, deadline_s)
            session, sequence = self._session, self._sequence
            forward, place = session.submit_before_place(
                sequence, "forward", spec, "forward_backward", custom.offsets
            )
        except Exception:
            self._poison_window()
            raise

        async def make() -> None:
            session.fill(
                sequence, place, await self._backward(custom, forward, place, fn, deadline_s)
            )

        session.make(make)
        return place.future

    def _encoded(self, batch: Any) -> EncodedBatch:
        dp = self.config.dp_config
        private = dp is not None and dp.enabled
        return encode_private_batch(batch) if private else encode_batch(batch)

    def optim_step(
        self,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        grad_clip_norm: float | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[OptimStepResult]:
        """Closes a call of the accumulation window; the N-th call applies the update.

        Args:
            learning_rate: step size of this update. None: the run's.
            weight_decay: weight decay of this update. None: the run's.
            grad_clip_norm: L2 norm to which its gradient is clipped. None: the run's.
            deadline_s: how long it may wait on the server, seconds: if it has not started by then,
                it never runs, and the window stays open. None: for ever.
        """
        spec = specs.optim_step(
            self.run_id,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
        )
        specs.set_deadline(spec, deadline_s)
        return self._session.submit_numbered(self._sequence, "optim_step", spec)

    def private_step(
        self,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        grad_clip_norm: float | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[OptimStepResult]:
        """Makes one whole private step on a batch that the server draws; `train_private` makes
        many. For runs with sampling="server_poisson".

        Args:
            learning_rate, weight_decay, deadline_s: as for `optim_step`.
            grad_clip_norm: L2 norm to which its noised gradient is clipped. None: the run's.
        """
        spec = specs.private_step(
            self.run_id,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            grad_clip_norm=grad_clip_norm,
        )
        specs.set_deadline(spec, deadline_s)
        return self._session.submit_numbered(self._sequence, "private_step", spec)

    def sample_async(
        self,
        prompts: Any,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: Any = None,
        num_samples: int | None = None,
        *,
        top_logprobs: int | None = None,
        prompt_logprobs: bool | None = None,
        step: int | None = None,
        artifact: str | None = None,
        deadline_s: float | None = None,
    ) -> OperationFuture[SampleResult]:
        """Generates text; the future twin of `sample`, with the same arguments."""
        return self._submit_sample(
            prompts,
            {
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "min_p": min_p,
                "seed": seed,
                "stop": stop,
                "num_samples": num_samples,
                "top_logprobs": top_logprobs,
                "prompt_logprobs": prompt_logprobs,
                "step": step,
                "artifact": artifact,
                "deadline_s": deadline_s,
            },
        )

    def _submit_sample(
        self, prompts: Any, options: RunSampling, *, stream: bool = False
    ) -> OperationFuture[SampleResult]:
        step, artifact = options.get("step"), options.get("artifact")
        weights = sampling.run_weights(step, artifact)
        spec = sampling.sample(
            prompts,
            weights,
            options,
            run_id=None if artifact is not None else self.run_id,
            stream=stream,
        )
        specs.set_deadline(spec, options.get("deadline_s"))
        if weights.WhichOneof("source") == "current":
            return self._session.submit_numbered(self._sequence, "sample", spec)
        return self._session.submit_unnumbered("sample", spec)

    def save_state_async(
        self,
        metadata: Mapping[str, Any] | None = None,
        include_optimizer: bool | None = None,
        ttl_s: float | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[SaveStateResult]:
        """Saves the adapter; the future twin of `save_state`, with the same arguments."""
        spec = specs.save_state(self.run_id, metadata, include_optimizer, ttl_s)
        specs.set_deadline(spec, deadline_s)
        return self._session.submit_numbered(self._sequence, "save_state", spec)

    def load_state_async(
        self,
        artifact_id: str,
        include_optimizer: bool | None = None,
        *,
        deadline_s: float | None = None,
    ) -> OperationFuture[LoadStateResult]:
        """Restores a state; the future twin of `load_state`, with the same arguments."""
        spec = specs.load_state(self.run_id, artifact_id, include_optimizer)
        specs.set_deadline(spec, deadline_s)
        return self._session.submit_numbered(self._sequence, "load_state", spec)

    async def _backward(
        self,
        custom: CustomBatch,
        forward: OperationFuture[ForwardResult],
        place: Place,
        fn: LossFunction,
        deadline_s: float | None,
    ) -> OperationSpec:
        """What fills the place behind a forward pass; without a loss, what poisons its window."""
        try:
            result = await forward
        except TenSafeError as error:
            place.future._fail(error)
            return specs.refused_forward_backward(self.run_id)
        value = await asyncio.to_thread(evaluate, fn, Logprobs(result.logprobs))
        if not isinstance(value, LossValue):
            place.future._fail(value)
            return specs.refused_forward_backward(self.run_id)
        spec = custom.backward(self.run_id, value)
        specs.set_deadline(spec, deadline_s)
        place.future._shown = value.shown_in
        return spec

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.run_id} model={self.config.model_ref} step={self.step}>"
        )

    def _poison_window(self) -> None:
        """Records a forward_backward that was refused here where it would have run.

        Sent without a batch, it is refused by the server too, and so poisons its window.
        """
        spec = specs.refused_forward_backward(self.run_id)
        # A session that takes no more operations cannot step on half a gradient either.
        with contextlib.suppress(TenSafeError):
            self._session.submit_numbered(self._sequence, "forward_backward", spec)

    def _take_info(self, info: RunInfo) -> RunInfo:
        self._info = info
        self._sequence.step = max(self._sequence.step, info.step) if self._pending() else info.step
        return info

    def _pending(self) -> bool:
        return self._session.operations.has_pending(self.run_id)
