"""GRPO as a user would write it with `transformers` and `peft`: the baseline of `bench_rlvr.py`.

The same task, warm-up, sampling and optimizer as the service's, in one process: `generate`, padded
batches, logits of every position.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensafe_client.rlvr import Environment
from tensafe_client.rlvr.advantages import MovingAverage, advantages, is_equal
from tensafe_client.rlvr.report import passed
from tensafe_client.rlvr.rollouts import Rollout
from workers.engine.model_sources import resolve


@dataclass(frozen=True)
class Recipe:
    """What both sides do.

    Attributes:
        warm_up_steps, warm_up_rate: supervised steps on right answers first, of `prompts` examples.
        prompts, group_size, max_tokens: of a batch of rollouts.
        learning_rate: of the updates by reward.
        dtype: of the plain loop's frozen weights: what it is faster in on a CPU.
    """

    iterations: int = 20
    warm_up_steps: int = 8
    warm_up_rate: float = 1e-3
    prompts: int = 8
    group_size: int = 8
    max_tokens: int = 4
    learning_rate: float = 2e-4
    rank: int = 16
    dtype: torch.dtype = torch.float32


@dataclass
class Curve:
    """What a training was like.

    Attributes:
        sampled: share of the rollouts that were right, by iteration.
        seconds: of each iteration.
    """

    sampled: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class PlainGrpo:
    """One training."""

    def __init__(self, model_ref: str, environment: Environment, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        path = resolve(model_ref).location
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        base = AutoModelForCausalLM.from_pretrained(path, dtype=recipe.dtype)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=recipe.rank, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
        self._model: Any = get_peft_model(base, lora)
        self._weights = [part for part in self._model.parameters() if part.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, weight_decay=0.01)
        self._environment, self._recipe = environment, recipe

    def train(self, curve: Curve) -> None:
        """Warms up, then learns from rollouts."""
        self._warm_up()
        for iteration in range(self._recipe.iterations):
            begin = time.perf_counter()
            curve.sampled.append(self._iterate(iteration))
            curve.seconds.append(time.perf_counter() - begin)

    def _iterate(self, iteration: int) -> float:
        recipe = self._recipe
        first = iteration * recipe.prompts
        problems = [self._environment.problem(first + i) for i in range(recipe.prompts)]
        prompts = [self._tokenizer(str(one.prompt))["input_ids"] for one in problems]
        rows = [prompt for prompt in prompts for _ in range(recipe.group_size)]
        generated = self._generate(rows)
        rollouts = []
        for row, (prompt, tokens) in enumerate(zip(rows, generated, strict=True)):
            group = row // recipe.group_size
            rollout = Rollout(problems[group], group, list(prompt))
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            reply = self._environment.reply(rollout.problem, [text])
            assert not isinstance(reply.reward, float | int)
            rollout.score(reply.reward)
            rollouts.append(rollout)
        size = recipe.group_size
        rewards = [
            np.asarray([one.reward for one in rollouts[i : i + size]])
            for i in range(0, len(rollouts), size)
        ]
        found = advantages(rewards, "group_mean", "group", MovingAverage())
        learned = [
            (row * size + i, float(found[row][i]))
            for row in range(len(rewards))
            if not is_equal(rewards[row])
            for i in range(size)
        ]
        if learned:
            self._update([(rows[i], generated[i], advantage) for i, advantage in learned])
        return sum(passed(one, 1.0) for one in rollouts) / len(rollouts)

    @torch.no_grad()
    def _generate(self, rows: list[list[int]]) -> list[list[int]]:
        self._model.eval()
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=self._recipe.max_tokens,
            pad_token_id=0,
        )
        end = self._tokenizer.eos_token_id
        rows_out = []
        for row in output[:, longest:].tolist():
            length = row.index(end) + 1 if end in row else len(row)
            rows_out.append(row[:length])
        return rows_out

    def _update(self, items: list[tuple[list[int], list[int], float]]) -> None:
        """On-policy: the ratio is 1, and only its gradient counts."""
        ids, mask, written = _padded([(prompt, tokens) for prompt, tokens, _ in items])
        advantage = torch.tensor([advantage for *_, advantage in items])[:, None]
        self._step(ids, mask, written, -advantage, self._recipe.learning_rate)

    def _warm_up(self) -> None:
        recipe = self._recipe
        for step in range(recipe.warm_up_steps):
            items = []
            for index in range(step * recipe.prompts, (step + 1) * recipe.prompts):
                problem = self._environment.problem(index)
                answer = f" {problem.meta['entry']['answer']}"
                prompt = self._tokenizer(str(problem.prompt))["input_ids"]
                after = self._tokenizer(answer)["input_ids"] + [self._tokenizer.eos_token_id]
                items.append((prompt, after))
            ids, mask, written = _padded(items)
            self._step(ids, mask, written, torch.tensor(-1.0), recipe.warm_up_rate)

    def _step(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        written: torch.Tensor,
        factor: torch.Tensor,
        rate: float,
    ) -> None:
        self._model.train()
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scored = written[:, 1:]
        loss = (factor * logprobs * scored).sum() / scored.sum()
        loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()


def _padded(
    items: list[tuple[list[int], list[int]]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and what the policy wrote, each [B, T], padded on the right."""
    longest = max(len(prompt) + len(after) for prompt, after in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask, written = torch.zeros_like(ids), torch.zeros(len(items), longest)
    for row, (prompt, after) in enumerate(items):
        total = len(prompt) + len(after)
        ids[row, :total] = torch.tensor(prompt + after)
        mask[row, :total] = 1
        written[row, len(prompt) : total] = 1
    return ids, mask, written
