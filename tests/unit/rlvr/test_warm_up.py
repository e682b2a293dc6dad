"""What a warm-up learns of an environment's problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_run import Done, Passed, Run

from tensafe_client import ConfigError, Datum
from tensafe_client.data import Example
from tensafe_client.rlvr import Problem, Reply, warm_up


@dataclass
class Supervised(Run):
    """Takes batches under the loss and the reduction that the service has by default."""

    def forward_backward(self, batch: Sequence[Datum], **options: Any) -> Done:
        assert not options
        self._open += batch
        return Done(Passed(loss=self.step))


@dataclass
class Asking:
    """The same question again and again; the answer is its number."""

    prompt: Any

    def problem(self, index: int) -> Problem:
        return Problem(self.prompt, {"answer": index})

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        raise NotImplementedError


@dataclass
class Tokenizer:
    """Writes down what it is to encode."""

    told: list[Example] = field(default_factory=list)

    def datum(self, example: Example) -> Datum:
        self.told.append(example)
        return Datum([1, 2], [2, 3])


def warmed(prompt: Any) -> tuple[Supervised, list[Example], list[float]]:
    run, tokenizer = Supervised(), Tokenizer()
    losses = warm_up(
        run,  # type: ignore[arg-type]
        Asking(prompt),
        tokenizer,  # type: ignore[arg-type]
        steps=2,
        batch_size=3,
        learning_rate=0.5,
    )
    return run, tokenizer.told, losses


def test_answers_follow_their_questions_after_a_space():
    run, told, losses = warmed("2 + 2 =")
    assert {example.prompt for example in told} == {"2 + 2 ="}
    assert [example.completion for example in told] == [f" {index}" for index in range(6)]
    assert [len(update) for update in run.learned] == [3, 3]
    assert run.stepped == [{"learning_rate": 0.5}] * 2
    assert losses == [0, 1]


def test_answers_to_messages_are_the_assistants():
    _, told, _ = warmed([{"role": "user", "content": "2 + 2?"}])
    assert told[5].messages == (
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "5"},
    )
    assert {example.prompt_messages for example in told} == {1}


@pytest.mark.parametrize("prompt", [[1, 2], np.array([1, 2])])
def test_token_ids_have_no_answer_as_text(prompt: Any):
    with pytest.raises(ConfigError, match="token ids"):
        warmed(prompt)
