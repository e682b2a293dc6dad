"""What each built-in reward gives, and what the registry refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tensafe_client import ConfigError
from tensafe_client.rlvr import rewards
from tensafe_client.rlvr.rewards.outcomes import plain, total

ANSWER_7 = {"answer": "7"}
NESTED = {"type": "array", "items": {"$ref": "#"}}
TAGGED = {"pattern": r"<answer>(.*?)</answer>", "group": 1}


@pytest.mark.parametrize(
    ("name", "options", "completion", "meta", "expected"),
    [
        ("exact_match", {}, " 7\n", ANSWER_7, 1.0),
        ("exact_match", {}, "07", ANSWER_7, 0.0),
        ("exact_match", {}, "Paris", {"answer": "paris"}, 0.0),
        ("exact_match", {"ignore_case": True}, "Paris", {"answer": "paris"}, 1.0),
        ("numeric_match", {}, "3 + 4 = 7.0", ANSWER_7, 1.0),
        ("numeric_match", {}, "it is 1,007", {"answer": "1007"}, 1.0),
        ("numeric_match", {}, "-7", ANSWER_7, 0.0),
        ("numeric_match", {}, "7e0", ANSWER_7, 1.0),
        ("numeric_match", {"any_number": 0.2}, "8", ANSWER_7, 0.2),
        ("numeric_match", {"any_number": 0.2}, "eight", ANSWER_7, 0.0),
        ("numeric_match", {"any_number": 0.2}, "1e999999999", ANSWER_7, 0.2),
        ("numeric_match", {}, "1e99999999999999999999", ANSWER_7, 0.0),
        ("numeric_match", {}, "0.3", {"answer": "0.30"}, 1.0),
        ("numeric_match", {"tolerance": 0.1}, "7.1", ANSWER_7, 1.0),
        ("numeric_match", {"tolerance": 0.1}, "7.11", ANSWER_7, 0.0),
        ("numeric_match", {}, "x = 1/2", {"answer": "1/2"}, 1.0),
        ("numeric_match", {}, "x = 0.5", {"answer": "1/2"}, 1.0),
        ("numeric_match", {}, "x = -2 / 6", {"answer": "-1/3"}, 1.0),
        ("numeric_match", {}, "x = 1/3", {"answer": "1/2"}, 0.0),
        ("numeric_match", {"tolerance": 0.2}, "x = 1/3", {"answer": "1/2"}, 1.0),
        ("numeric_match", {"tolerance": 0.1}, "x = 1/3", {"answer": "1/2"}, 0.0),
        ("numeric_match", {"any_number": 0.2}, "7/0", ANSWER_7, 0.2),
        ("numeric_match", {}, "1" + "0" * 29 + "1", {"answer": "1" + "0" * 30}, 0.0),
        ("numeric_match", {}, "1" + "0" * 30, {"answer": "1e30"}, 1.0),
        ("numeric_match", {}, "0." + "3" * 40, {"answer": "1/3"}, 0.0),
        ("regex", {"pattern": r"<answer>.*</answer>"}, "a <answer>\n7</answer>", {}, 1.0),
        (
            "regex",
            {"pattern": r"<answer>(.*?)</answer>", "group": 1},
            "<answer>7</answer>",
            ANSWER_7,
            1.0,
        ),
        (
            "regex",
            {"pattern": r"<answer>(.*?)</answer>", "group": 1},
            "<answer>8</answer>",
            ANSWER_7,
            0.0,
        ),
        ("regex", {"pattern": "x"}, "y", {}, 0.0),
        ("json_schema", {"schema": {"required": ["a"]}}, '{"a": 1}', {}, 1.0),
        ("json_schema", {"schema": {"required": ["a"]}, "parses": 0.1}, '{"b": 1}', {}, 0.1),
        ("json_schema", {"schema": {"required": ["a"]}, "parses": 0.1}, "{a", {}, 0.0),
        ("json_schema", {"schema": {}}, "[" * 100_000, {}, 0.0),
        ("json_schema", {"schema": {"type": "number"}, "parses": 0.1}, "NaN", {}, 0.0),
        ("json_schema", {"schema": {}, "parses": 0.1}, "[-Infinity]", {}, 0.0),
        ("json_schema", {"schema": {"multipleOf": 0.1}, "parses": 0.1}, "1e999", {}, 0.1),
        ("json_schema", {"schema": NESTED, "parses": 0.1}, "[[]]", {}, 1.0),
        ("json_schema", {"schema": NESTED, "parses": 0.1}, "[" * 900 + "]" * 900, {}, 0.1),
        ("length", {"target": 3, "scale": 10}, "abc", {}, 1.0),
        ("length", {"target": 3, "scale": 10}, "a" * 8, {}, 0.5),
        ("length", {"target": 3, "scale": 10}, "a" * 99, {}, 0.0),
        ("keywords", {"keywords": ["red", "blue"]}, "Red, not bluer", {}, 0.5),
        ("keywords", {"keywords": ["red"], "ignore_case": False}, "Red", {}, 0.0),
        ("math_verify", {}, r"so $\frac{14}{2}$", ANSWER_7, 1.0),
        ("math_verify", {}, r"so $\frac{13}{2}$", ANSWER_7, 0.0),
        ("math_verify", {}, "no formula", ANSWER_7, 0.0),
        ("math_verify", {}, r"so $\sqrt{2}$", {"answer": r"\sqrt{2}"}, 1.0),
        ("math_verify", {}, "so $2$", {"answer": r"\sqrt{2}"}, 0.0),
        ("math_verify", {}, "so $1+x$", {"answer": "x+1"}, 1.0),
        ("math_verify", {}, "so $(1, 2)$", {"answer": "(1,2)"}, 1.0),
        ("math_verify", {}, "so $0.5$", {"answer": r"\(\frac{1}{2}\)"}, 1.0),
    ],
)
def test_known_answers(name, options, completion, meta, expected):
    assert rewards.reward(name, **options)("prompt", completion, meta) == pytest.approx(expected)


def test_a_weighted_sum_reports_its_parts():
    reward = rewards.reward(
        "weighted_sum",
        parts={"exact_match": {"weight": 0.8}, "length": {"weight": -0.5, "target": 0, "scale": 2}},
    )
    assert reward("p", "7", ANSWER_7) == {
        "exact_match": 1.0,
        "length": 0.5,
        "reward": pytest.approx(0.55),
    }


def test_every_reward_is_in_the_table():
    assert set(rewards.rewards()) >= {
        *("exact_match", "json_schema", "keywords", "length", "math_verify"),
        *("numeric_match", "regex", "weighted_sum"),
    }


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("no_such", {}, "exact_match"),
        ("exact_match", {"case": True}, "case"),
        ("regex", {"pattern": "("}, "pattern"),
        ("json_schema", {"schema": {"type": 5}}, "schema"),
        ("keywords", {"keywords": "red"}, "keywords"),
        ("length", {"target": 1, "scale": 0}, "scale"),
        ("weighted_sum", {"parts": {}}, "parts"),
    ],
)
def test_wrong_options_are_named(name, options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        rewards.reward(name, **options)
    assert caught.value.violations


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("exact_match", {"ignore_case": "no"}, "ignore_case"),
        ("numeric_match", {"tolerance": -1}, "tolerance"),
        ("numeric_match", {"tolerance": float("nan")}, "tolerance"),
        ("numeric_match", {"tolerance": "0.1"}, "tolerance"),
        ("numeric_match", {"any_number": float("inf")}, "any_number"),
        ("regex", {"pattern": 5}, "pattern"),
        ("regex", {"pattern": "(a)", "group": 2}, "group"),
        ("regex", {"pattern": "(a)", "group": "word"}, "group"),
        ("regex", {"pattern": "(a)", "group": -1}, "group"),
        ("json_schema", {"schema": {}, "parses": "0.1"}, "parses"),
        ("length", {"target": "5"}, "target"),
        ("length", {"target": -1}, "target"),
        ("keywords", {"keywords": [3]}, "keywords[0]"),
        ("keywords", {"keywords": ["a", ""]}, "keywords"),
        ("weighted_sum", {"parts": [1]}, "parts"),
        ("weighted_sum", {"parts": {"exact_match": 3}}, "parts.exact_match"),
        ("weighted_sum", {"parts": {"exact_match": {"weight": "x"}}}, "parts.exact_match.weight"),
        (
            "weighted_sum",
            {"parts": {"exact_match": {"weight": float("nan")}}},
            "parts.exact_match.weight",
        ),
    ],
)
def test_a_wrong_option_is_refused_when_the_reward_is_made(name, options, field):
    with pytest.raises(ConfigError) as caught:
        rewards.reward(name, **options)
    assert caught.value.violations[0][0] == field


def test_the_parts_of_a_weighted_sum_are_weights_with_rewards():
    assert rewards.WeightedSum({"right": (2, rewards.ExactMatch())})("p", "7", ANSWER_7) == {
        "right": 1.0,
        "reward": 2.0,
    }
    for part in (rewards.ExactMatch(), (1.0, "exact_match"), (1.0,)):
        with pytest.raises(ConfigError) as caught:
            rewards.WeightedSum({"right": part})  # type: ignore[dict-item]
        assert caught.value.violations[0][0] == "parts.right"


def test_an_answer_that_is_no_number_is_told():
    for answer in ("about 7", "1/2/3", ""):
        with pytest.raises(ValueError, match="is no number"):
            rewards.NumericMatch()("p", "7", {"answer": answer})


def test_an_answer_without_a_formula_is_told():
    for answer in ("", " "):
        with pytest.raises(ValueError, match="nothing can be read"):
            rewards.MathVerify()("p", "$7$", {"answer": answer})


def test_a_schema_that_is_none_is_named_in_a_line():
    with pytest.raises(ConfigError, match="is no JSON schema") as caught:
        rewards.reward("json_schema", schema={"type": "word"})
    assert "\n" not in caught.value.message


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="exact_match"):
        rewards.register_reward("exact_match")(rewards.ExactMatch)


def test_a_reward_without_an_answer_to_compare_says_so():
    with pytest.raises(KeyError, match="answer"):
        rewards.ExactMatch()("p", "7", {})


def test_only_finite_numbers_are_rewards():
    assert total(np.float32(0.5)) == 0.5
    assert total({"reward": 1, "parts": 3}) == 1.0
    for bad in (None, "1", True, {}, {"reward": None}):
        with pytest.raises(TypeError):
            total(bad)  # type: ignore[arg-type]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            total(bad)
    for large in (1e39, -1e300, 10**31):
        with pytest.raises(ValueError, match="from -1e\\+30 to 1e\\+30"):
            total(large)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        ({"reward": np.float32(1), "right": np.bool_(True), "n": np.int8(3), "b": False},) * 2,
        ({"reward": 1}, {"reward": 1.0}),
    ],
)
def test_numbers_of_every_kind_become_plain_ones(outcome, expected):
    found = plain(outcome)
    assert found == expected
    values = found.values() if isinstance(found, dict) else [found]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize(
    ("parts", "error", "says"),
    [
        ({"x": "str"}, TypeError, "part 'x' must be a number, got 'str'"),
        ({"x": None}, TypeError, "part 'x' must be a number, got None"),
        ({"x": float("nan")}, ValueError, "part 'x' must be finite, got nan"),
        ({3: 1.0}, TypeError, "names for keys, got 3"),
    ],
)
def test_a_part_that_is_no_number_is_named(parts, error, says):
    with pytest.raises(error, match=says):
        plain({"reward": 1.0, **parts})
