"""Every field of RLVRConfig has its effect or is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from tensafe_client import ConfigError
from tensafe_client.rlvr import RLVRConfig
from tensafe_client.rlvr.state import TrainerState

WRONG = [
    ("algorithm", {"algorithm": "trpo"}),
    ("aggregate", {"aggregate": "median"}),
    ("scale", {"scale": "word"}),
    ("iterations", {"iterations": 0}),
    ("prompts", {"prompts": 1.5}),
    ("max_staleness", {"max_staleness": -1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("temperature", {"temperature": 100.5}),
    ("eval_temperature", {"eval_problems": 4, "eval_temperature": 101}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": math.nan}),
    ("kl_coef", {"kl_coef": -0.1}),
    ("clip_low", {"clip_low": 1.1}),
    ("clip_high", {"clip_high": 0.9}),
    ("max_failed_rewards", {"max_failed_rewards": 2}),
    ("filter_equal_groups", {"filter_equal_groups": 1}),
    ("reference", {"reference": 5, "kl_coef": 0.1}),
    ("stop", {"stop": "\n"}),
    ("stop", {"stop": 5}),
    ("stop[1]", {"stop": ["\n", 2.5]}),
    ("stop[0]", {"stop": [""]}),
    ("stop[0]", {"stop": [-1]}),
    # No effect:
    ("eval_temperature", {"eval_temperature": 0.5}),
    ("eval_problems", {"eval_problems": 8}),
    ("clip_low", {"algorithm": "rloo", "clip_low": 0.5}),
    ("clip_high", {"algorithm": "reinforce", "clip_high": 1.5}),
    ("baseline", {"algorithm": "grpo", "baseline": "batch_mean"}),
    ("baseline", {"algorithm": "ppo", "baseline": "group_mean"}),
    ("baseline_decay", {"algorithm": "ppo", "baseline_decay": 0.5}),
    ("reference", {"reference": "art-1"}),
    ("max_batches", {"max_batches": 2, "filter_equal_groups": False}),
    ("group_size", {"group_size": 1}),
    ("minibatches", {"prompts": 2, "group_size": 2, "minibatches": 5}),
]


@pytest.mark.parametrize(("field", "given"), WRONG)
def test_a_wrong_field_is_named(field, given):
    with pytest.raises(ConfigError) as caught:
        RLVRConfig.of(given)
    assert caught.value.violations[0][0] == field


def test_an_unknown_field_names_the_closest():
    with pytest.raises(ConfigError, match=r"itertions.*iterations"):
        RLVRConfig.of({"itertions": 5})
    with pytest.raises(ConfigError, match="dict"):
        RLVRConfig.of(5)  # type: ignore[arg-type]


def test_what_is_left_out_is_left_to_the_service():
    assert RLVRConfig().loss_config() == {}
    config = RLVRConfig(clip_high=1.3, kl_coef=0.1)
    assert config.loss_config() == {"clip_high": 1.3, "kl_coef": 0.1}


def test_a_checkpoint_goes_on_with_the_same_configuration_only():
    config = RLVRConfig(algorithm="ppo", baseline="moving_average", stop=["\n"])
    state = TrainerState.fresh(config)
    state.iteration, state.next_batch = 3, 5
    state.average.take_in(0.7)
    saved = json.loads(json.dumps(state.metadata(config)))
    assert TrainerState.from_metadata(saved, config) == state
    longer = dataclasses.replace(config, iterations=500, reward_processes=9)
    assert TrainerState.from_metadata(saved, longer) == state
    for change in ({"seed": 1}, {"prompts": 9}, {"stop": None}, {"checkpoint_every": 2}):
        with pytest.raises(ConfigError) as caught:
            TrainerState.from_metadata(saved, dataclasses.replace(config, **change))
        assert caught.value.violations[0][0] in change
    with pytest.raises(ConfigError, match="no RLVR training"):
        TrainerState.from_metadata({"note": "sft"}, config)


def test_a_checkpoint_goes_on_with_the_same_task_only():
    config = RLVRConfig()
    saved = TrainerState.fresh(config, {"task": "sums", "task_seed": 3}).metadata(config)
    same = TrainerState.from_metadata(saved, config, {"task": "sums", "task_seed": 3})
    assert same.metadata(config) == saved
    for name, value in (("task", "products"), ("task_seed", 4)):
        with pytest.raises(ConfigError) as caught:
            TrainerState.from_metadata(saved, config, {"task": "sums", "task_seed": 3, name: value})
        assert caught.value.violations[0][0] == name
    # An environment without a name is its maker's care.
    assert not TrainerState.from_metadata(saved, config).task
