"""Supervised steps before the first rollouts: a model that never succeeds has nothing to learn."""

from __future__ import annotations

from collections.abc import Mapping

from tensafe_client.checks import check_count, check_number
from tensafe_client.data import Datum, Example
from tensafe_client.data.chat import ChatTokenizer
from tensafe_client.errors import ConfigError
from tensafe_client.rlvr.environments import Environment, Problem
from tensafe_client.training import TrainingClient


def warm_up(
    run: TrainingClient,
    environment: Environment,
    tokenizer: ChatTokenizer,
    *,
    steps: int = 8,
    batch_size: int = 8,
    learning_rate: float | None = None,
) -> list[float]:
    """Trains a run on the right answers of an environment's first problems.

    Args:
        environment: whose problems have an `answer`, in their meta or in a task's entry.
        steps: updates; problem `step · batch_size` is the first of each.

    Returns:
        The loss before each update.

    Raises:
        ConfigError: if a problem has no answer, or its prompt is token ids.
    """
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    if learning_rate is not None:
        check_number("learning_rate", learning_rate)
    sent = []
    for step in range(steps):
        first = step * batch_size
        batch = [
            _datum(environment.problem(index), tokenizer)
            for index in range(first, first + batch_size)
        ]
        sent.append(run.forward_backward(batch))
        run.optim_step(learning_rate=learning_rate)
    return [future.result().loss for future in sent]


def _datum(problem: Problem, tokenizer: ChatTokenizer) -> Datum:
    meta = problem.meta.get("entry", problem.meta)
    if "answer" not in meta:
        raise ConfigError.of("environment", "has a problem without an answer to warm up on")
    prompt, answer = problem.prompt, str(meta["answer"])
    if isinstance(prompt, str):
        return tokenizer.datum(Example(prompt=prompt, completion=f" {answer}"))
    messages = [dict(item) for item in prompt if isinstance(item, Mapping)]
    if len(messages) != len(prompt):
        raise ConfigError.of("environment", "has token ids for prompts: warm up with datums")
    told = (*messages, {"role": "assistant", "content": answer})
    return tokenizer.datum(Example(messages=told, prompt_messages=len(messages)))
