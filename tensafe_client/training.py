"""The client of one run, for code without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from tensafe_client.api import Api
from tensafe_client.infos import RunInfo
from tensafe_client.operations import RunOperations
from tensafe_client.private_training import PrivateSteps, check_on_step
from tensafe_client.results import (
    LoadStateResult,
    OptimStepResult,
    SaveStateResult,
    StepMetrics,
)
from tensafe_client.samples import SampleResult
from tensafe_client.sampling import RunSampling
from tensafe_client.sequence import RunSequence
from tensafe_client.session import Session
from tensafe_client.streams import iterate
from tensafe_client.token_streams import SampleStream


class TrainingClient(RunOperations):
    """One run: its adapter, optimizer and order of operations.

    `forward`, `forward_backward` and `optim_step` return futures at once and may be pipelined
    freely; `sample`, `save_state` and `load_state` wait for their results and have `…_async` twins
    that return futures. Made by `ServiceClient.create_training_client` and `training_client`.

        with client.create_training_client({"model_ref": "smollm2-135m"}) as tc:
            for batch in dataloader:
                tc.forward_backward(batch)
                step = tc.optim_step()
            print(step.result())

    Leaving the `with` block does not delete the run: attach to it with
    `client.training_client(run_id)`.
    """

    def __init__(self, session: Session, info: RunInfo, sequence: RunSequence) -> None:
        super().__init__(session, info, sequence)
        self._api = Api(session)

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[True], **options: Unpack[RunSampling]
    ) -> SampleStream: ...

    @overload
    def sample(
        self, prompts: Any, *, stream: Literal[False] = False, **options: Unpack[RunSampling]
    ) -> SampleResult: ...

    def sample(
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
        stream: bool = False,
    ) -> SampleResult | SampleStream:
        """Generates text; waits for it, or iterates its tokens as they are drawn. What is None is
        left to the server's default.

        It begins at its place in the run's order, on a copy of the weights that it finds there: a
        sample behind an `optim_step` has the stepped weights, and what is submitted behind it may
        train meanwhile. With `step` or `artifact` it waits for nothing of the run.

        Args:
            prompts: one prompt or a list; a prompt is text, a list of token ids, or a list of chat
                messages (`{"role": …, "content": …}`).
            max_tokens: longest completion, tokens, the one that ends it included, or less where the
                model's context ends. Default 128.
            temperature: divides the logits; 0 takes the likeliest token. Default 1.
            top_p: the smallest set of tokens with this probability. Default 1.
            top_k: only the k likeliest; 0 for all. Default 0.
            min_p: only tokens of at least this share of the likeliest one's probability.
            seed: seed of this call. Default: derived from the run's seed and the operation.
            stop: texts or token ids that end a completion, as the model's end token always does;
                only with an empty list nothing ends it early.
            num_samples: completions for each prompt. Default 1.
            top_logprobs: also tell the k likeliest tokens at each place, at most 20. Default 0.
            prompt_logprobs: also tell the log-probability of each token of the prompts.
            step: sample the weights as saved after this step, instead of the current ones.
            artifact: sample an artifact, instead of the current weights.
            deadline_s: how long it may wait on the server, seconds: if it has not started by then,
                it never runs and ends with DeadlineExceededError. Default: for ever.
            stream: return a `SampleStream` at once.
        """
        future = self._submit_sample(
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
            stream=stream,
        )
        return SampleStream(self._session, future) if stream else future.result()

    def train_private(
        self,
        steps: int,
        learning_rate: float | Callable[[int], float] | None = None,
        on_step: Callable[[OptimStepResult], None] | None = None,
    ) -> list[OptimStepResult]:
        """Trains privately, on batches that the server draws from the run's dataset, and waits.

        Args:
            steps: private steps to make.
            learning_rate: step size, or a schedule: a function of the update's number, from 1.
                None: the run's.
            on_step: called with each step's result as it comes.

        Raises:
            DPBudgetExceededError: the next step would pass `target_epsilon`. What was made before
                stays made; `on_step` has seen it, and `metrics()` has it.
        """
        check_on_step(on_step)
        results = []
        for result in PrivateSteps(self, steps, learning_rate):
            results.append(result)
            if on_step is not None:
                on_step(result)
        return results

    def save_state(
        self,
        metadata: Mapping[str, Any] | None = None,
        include_optimizer: bool | None = None,
        ttl_s: float | None = None,
        *,
        deadline_s: float | None = None,
    ) -> SaveStateResult:
        """Saves the adapter as an artifact, at this point of the run's order, and waits for it.

        Args:
            metadata: your own JSON object, kept with the artifact; at most 64 KiB.
            include_optimizer: also save what continuing needs. None: yes.
            ttl_s: how long the artifact is kept, seconds. None: until it is deleted.
            deadline_s: as for `sample`.
        """
        return self.save_state_async(
            metadata, include_optimizer, ttl_s, deadline_s=deadline_s
        ).result()

    def load_state(
        self,
        artifact_id: str,
        include_optimizer: bool | None = None,
        *,
        deadline_s: float | None = None,
    ) -> LoadStateResult:
        """Replaces the run's state by an artifact's, and waits for it.

        Args:
            artifact_id: an artifact of this tenant, of the same model and LoRA shape.
            include_optimizer: also restore optimizer, counters and open window. None: if it has
                them.
            deadline_s: as for `sample`.
        """
        return self.load_state_async(artifact_id, include_optimizer, deadline_s=deadline_s).result()

    def metrics(self, follow: bool = False, since: int = 0) -> Iterator[StepMetrics]:
        """Iterates the metrics of each applied update.

        Args:
            follow: go on with new steps as the server pushes them, until the loop is left or the
                run is deleted. The stream goes on by itself after a break. A loop that falls far
                behind gets some of the steps that it missed, the newest among them, and
                `StepMetrics.skipped` says how many are left out before each.
            since: only steps after this cursor (`StepMetrics.cursor`); 0 for all.
        """
        return iterate(self._session.io, self._api.metrics(self.run_id, since, follow))

    def refresh(self) -> RunInfo:
        """Asks the server for the run, and updates `info`, `status` and `step`."""
        return self._take_info(self._session.io.run(self._api.run(self.run_id)))

    def delete(self) -> RunInfo:
        """Deletes the run; its queued operations are cancelled, its artifacts stay."""
        return self._take_info(self._session.io.run(self._api.delete_run(self.run_id)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the run as it is."""
