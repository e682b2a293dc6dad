"""What a training sends to the service for each field of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_run import Run

from tensafe_client import ConfigError, Datum
from tensafe_client.rlvr import Problem, Reply, RLVRTrainer, trainer

SHORT = {"iterations": 1, "prompts": 2, "group_size": 4, "max_tokens": 5, "reward_processes": 1}


class Parity:
    """Rewards odd completions, of prompts of token ids."""

    def problem(self, index: int) -> Problem:
        return Problem([index, 1])

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        return Reply(float(int(completions[-1]) % 2))


class Insisting(Parity):
    """Always goes on."""

    def reply(self, problem: Problem, completions: Sequence[str]) -> Reply:
        return Reply({"reward": float(int(completions[-1]) % 2), "turns": 1}, then="again")


class Letters:
    """A tokenizer of one token for each letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of any context, in a service of one artifact."""
    model = SimpleNamespace(context_length=0)
    api = SimpleNamespace(model=lambda _: model, artifact={"art-1": object()}.__getitem__)
    monkeypatch.setattr(trainer, "Api", lambda _: api)
    return model


def trained(**config: Any) -> Run:
    run = Run()
    held_out = Parity() if "eval_every" in config else None
    RLVRTrainer(
        run,  # type: ignore[arg-type]
        Parity(),
        {**SHORT, **config},
        held_out=held_out,
        tokenizer=object(),  # type: ignore[arg-type]
    ).run()
    return run


def places(datums: Sequence[Datum]) -> list[int]:
    """Which completions they are."""
    return [int(datum.tokens[2]) - 100 for datum in datums]


def test_rollouts_are_sampled_as_configured_and_held_out_problems_as_theirs():
    run = trained(
        temperature=0.7, top_p=0.9, top_k=20, stop=["\n", 5], eval_every=1, eval_temperature=0.3
    )
    first, training, last = ({**options, "seed": None} for options in run.sampled)
    assert training == {
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "stop": ["\n", 5],
        "num_samples": 4,
        "seed": None,
    }
    unfiltered = {"temperature": 0.3, "top_p": 1.0, "top_k": 0, "num_samples": 1}
    assert first == last == {**training, **unfiltered}


def test_draws_are_of_the_seed_and_the_batch_and_evaluations_draw_alike():
    def seeds(seed: int) -> list[int]:
        run = trained(seed=seed, iterations=2, max_staleness=0, eval_every=1)
        return [options["seed"] for options in run.sampled]

    before, first, between, second, after = seeds(1)
    assert before == between == after
    assert len({before, first, second}) == 3
    assert not {before, first, second} & set(seeds(2))


def test_a_learned_token_has_the_models_own_logprob_for_its_q():
    run = trained(temperature=0.7)
    learned = [datum for update in run.learned for datum in update]
    assert sorted(places(learned)) == list(range(8))
    for place, datum in zip(places(learned), learned, strict=True):
        np.testing.assert_array_equal(datum.inputs["logprobs"], [0, -2 - place, -0.25])


def test_the_loss_and_the_step_have_their_options():
    of_loss = {
        "clip_low": 0.5,
        "clip_high": 1.5,
        "kl_coef": 0.1,
        "reference": "art-1",
        "entropy_coef": 0.01,
    }
    of_step = {"learning_rate": 3e-4, "grad_clip_norm": 0.5}
    run = trained(inner_epochs=2, **of_loss, **of_step)
    assert run.passed == [{"loss_fn": "ppo", "loss_config": of_loss, "reduction": "sum"}] * 2
    assert run.stepped == [of_step] * 2
    plain = trained(algorithm="rloo")
    of_call = {"loss_fn": "importance_sampling", "loss_config": {}, "reduction": "sum"}
    assert plain.passed == [of_call]
    assert plain.stepped == [{"learning_rate": None, "grad_clip_norm": None}]


@pytest.mark.parametrize("prompt", [[5, 6], (5, 6), np.array([5, 6]), [np.int32(5), np.int32(6)]])
def test_token_ids_of_any_integers_are_prompts(monkeypatch: pytest.MonkeyPatch, prompt: Any):
    monkeypatch.setattr(Parity, "problem", lambda *_: Problem(prompt))
    assert {tuple(datum.tokens[:2]) for datum in trained().learned[0]} == {(5, 6)}


def test_a_prompt_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Parity, "problem", lambda *_: Problem([]))
    with pytest.raises(ConfigError, match="environment has a prompt without"):
        trained()


def test_a_reference_that_is_not_there_is_refused_before_anything_is_sampled(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Run, "sample_async", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(KeyError, match="art-2"):
        trained(kl_coef=0.1, reference="art-2")


def test_completions_that_were_cut_are_masked_if_asked():
    cut = {place for place in range(8) if place % 3 == 0}
    (masked,), (whole,) = trained(mask_truncated=True).learned, trained().learned
    assert set(places(masked)) == set(range(8)) - cut
    assert set(places(whole)) == set(range(8))


def test_the_minibatches_of_an_epoch_share_out_its_rollouts():
    run = trained(inner_epochs=2, minibatches=3)
    assert len(run.learned) == 6
    for epoch in (run.learned[:3], run.learned[3:]):
        parts = [places(update) for update in epoch]
        assert sorted(place for part in parts for place in part) == list(range(8))
        assert sorted(map(len, parts)) == [2, 3, 3]


def test_the_constant_aggregate_divides_by_the_longest_episode():
    (update,) = trained(aggregate="constant", max_turns=3).learned
    for datum in update:
        np.testing.assert_allclose(datum.weights, np.asarray([0, 1, 1]) / (8 * 5 * 3), rtol=1e-6)


def test_an_episode_ends_after_a_turn_that_was_cut():
    """Of the first turn's 8 completions, 3 are cut; the other 5 are asked again, once."""
    run = Run()
    (report,) = (
        RLVRTrainer(
            run,  # type: ignore[arg-type]
            Insisting(),
            {**SHORT, "max_turns": 2},
            tokenizer=Letters(),  # type: ignore[arg-type]
        )
        .run()
        .reports
    )
    assert len(run.samples) == 8 + 5
    assert report.parts["turns"] == (8 + 5) / 8
    cut = sum(sample.finish_reason == "length" for sample in run.samples)
    assert report.truncated == cut / 8
    seeds = [options["seed"] for options in run.sampled]
    assert len(set(seeds)) == len(seeds) == 2, "a turn draws as the one before it"


@pytest.mark.parametrize(("context", "asked_again"), [(10, 5), (9, 0)])
def test_an_episode_ends_where_the_environment_says_too_much(
    model: SimpleNamespace, context: int, asked_again: int
):
    """Prompt, turn and `again` are 9 tokens, which something must follow: where they do not fit,
    the update has none that the model cannot read."""
    model.context_length = context
    run = Run()
    (report,) = (
        RLVRTrainer(
            run,  # type: ignore[arg-type]
            Insisting(),
            {**SHORT, "max_turns": 2},
            tokenizer=Letters(),  # type: ignore[arg-type]
        )
        .run()
        .reports
    )
    assert len(run.samples) == 8 + asked_again
    longest = max(len(datum) for update in run.learned for datum in update)
    assert longest == (2 + 2 + 5 + 2 if asked_again else 2 + 2) - 1
    if not asked_again:
        assert report.truncated == 1
