"""Reinforcement learning with verifiable rewards: the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from tensafe_client.api import Api
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.downloads import Downloads
from tensafe_client.errors import ConfigError
from tensafe_client.rlvr.collecting import Collector, Sampling
from tensafe_client.rlvr.config import RLVRConfig
from tensafe_client.rlvr.environments import Environment
from tensafe_client.rlvr.loop import RLVRResult, TrainingLoop
from tensafe_client.rlvr.report import Evaluation, IterationReport
from tensafe_client.rlvr.scoring import ScoringPool
from tensafe_client.rlvr.state import TrainerState
from tensafe_client.training import TrainingClient


class RLVRTrainer:
    """Trains a run's adapter on rewards.

        RLVRTrainer(tc, Task(ChainSum()), {"iterations": 20, "max_tokens": 4}).run()

    The next batch is sampled while this one is learned (`max_staleness`): both are sent ahead, and
    the worker does them together. At a checkpoint of `checkpoint_every` nothing is sent ahead, so
    that a training that goes on from it is the one that was never interrupted, to the bit if the
    run is `deterministic`. One that goes on from elsewhere (a stop, `iterations` raised later) has
    the same problems, and draws their completions anew from newer weights where they would have
    been sampled ahead; with `max_staleness=0` nothing ever is.

    Args:
        run: the run; its configuration must have no gradient accumulation of its own.
        environment: what it is trained in.
        config: an `RLVRConfig` or a dict of its fields.
        held_out: what it is evaluated in, if `eval_every` is set.
        tokenizer: the model's. None: fetched from the service.
        task: what names the environment, such as `{"task_seed": 3}`: kept with checkpoints, so that
            a resume with another value is refused by its name.
        on_report: called after each iteration.
        on_evaluation: called after each evaluation, with the iterations that were learned.

    Raises:
        ConfigError: naming what does not fit.
    """

    def __init__(
        self,
        run: TrainingClient,
        environment: Environment,
        config: RLVRConfig | Mapping[str, Any] | None = None,
        *,
        held_out: Environment | None = None,
        tokenizer: ChatTokenizer | None = None,
        task: Mapping[str, str | int] | None = None,
        on_report: Callable[[IterationReport], None] | None = None,
        on_evaluation: Callable[[int, Evaluation], None] | None = None,
    ) -> None:
        self.run_client = run
        self.config = RLVRConfig.of(config)
        if run.config.gradient_accumulation_steps != 1:
            raise ConfigError.of(
                "gradient_accumulation_steps", "must be 1 in a run that RLVR trains"
            )
        if self.config.eval_every and held_out is None:
            raise ConfigError.of("held_out", "is needed to evaluate every so often (eval_every)")
        if held_out is not None and not self.config.eval_every:
            raise ConfigError.of("eval_every", "must be set for held_out to have an effect")
        self._environment, self._held_out = environment, held_out
        self._tokenizer = tokenizer
        self._task = dict(task or {})
        self._on_report = on_report
        self._on_evaluation = on_evaluation
        self._api = Api(run._session)

    def run(self, *, resume: str | None = None, stop: threading.Event | None = None) -> RLVRResult:
        """Trains until `iterations` batches were learned.

        Args:
            resume: artifact that an earlier `run` of this configuration has saved; it is loaded
                into the run first.
            stop: when set, the iteration at hand is finished and saved.

        Raises:
            RewardsFailedError: if too many rewards fail.
            ConfigError: if `resume` comes from another configuration or task.
            TenSafeError: what an operation failed with.
        """
        state = TrainerState.fresh(self.config, self._task)
        if self.config.reference not in (None, "base"):
            # The first update would find out, after a batch of samples and rewards.
            self._session_run(self._api.artifact(self.config.reference))
        if resume is not None:
            artifact = self._session_run(self._api.artifact(resume))
            state = TrainerState.from_metadata(artifact.metadata, self.config, self._task)
            self.run_client.load_state(resume, include_optimizer=True)
        with ExitStack() as open_pools:
            return self._loop(state, stop or threading.Event(), open_pools).run()

    def _loop(
        self, state: TrainerState, stop: threading.Event, open_pools: ExitStack
    ) -> TrainingLoop:
        config = self.config
        model_ref = self.run_client.config.model_ref
        model = self._session_run(self._api.model(model_ref))
        tokenizer = self._tokenizer or self._fetch_tokenizer(model_ref)

        def collector(environment: Environment, sampling: Sampling) -> Collector:
            pool = ScoringPool(environment, config.reward_processes, config.reward_timeout_s)
            return Collector(
                self.run_client,
                environment,
                open_pools.enter_context(pool),
                sampling,
                max_turns=config.max_turns,
                tokenizer=tokenizer,
                context_length=model.context_length,
            )

        training = Sampling(
            config.max_tokens, config.temperature, config.top_p, config.top_k, config.stop
        )
        greedy = Sampling(config.max_tokens, config.eval_temperature, stop=config.stop)
        return TrainingLoop(
            self.run_client,
            config,
            state,
            stop,
            collector(self._environment, training),
            None if self._held_out is None else collector(self._held_out, greedy),
            self._on_report or _ignore,
            self._on_evaluation or _ignore,
        )

    def _fetch_tokenizer(self, model_ref: str) -> ChatTokenizer | None:
        downloads = Downloads(self.run_client._session)
        files = self._session_run(downloads.tokenizer(model_ref))
        return ChatTokenizer(files) if "tokenizer.json" in files else None

    def _session_run(self, coroutine: Any) -> Any:
        return self.run_client._session.io.run(coroutine)


def _ignore(*_: object) -> None:
    """Nobody listens."""
