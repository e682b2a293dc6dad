"""Built-in rewards: each a small value that judges one completion, 0 to 1 unless it says else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, DecimalException, localcontext
from typing import Any

from tensafe_client.checks import (
    check_bool,
    check_count,
    check_number,
    check_string,
    check_strings,
)
from tensafe_client.errors import ConfigError, MissingExtraError
from tensafe_client.rlvr.rewards.registry import register_reward

_DECIMAL = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"({_DECIMAL})(?: ?/ ?(\d[\d,]*))?")
_MORE_DIGITS = 40
_FORMULA_BEGINS = ("$", "\\(", "\\[", "\\boxed")


def expected(meta: Mapping[str, Any]) -> str:
    """The problem's `answer`.

    Raises:
        KeyError: if it has none; the reward cannot judge then.
    """
    if "answer" not in meta:
        raise KeyError("the problem's meta has no 'answer', which this reward compares with")
    return str(meta["answer"])


def _check_finite(field: str, value: object) -> None:
    if not math.isfinite(check_number(field, value)):
        raise ConfigError.of(field, f"must be finite, got {value!r}")


@register_reward("exact_match")
@dataclass(frozen=True)
class ExactMatch:
    """1 if the completion is the answer, white space around it aside."""

    ignore_case: bool = False

    def __post_init__(self) -> None:
        check_bool("ignore_case", self.ignore_case)

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        given, answer = completion.strip(), expected(meta).strip()
        if self.ignore_case:
            given, answer = given.casefold(), answer.casefold()
        return float(given == answer)


@register_reward("numeric_match")
@dataclass(frozen=True)
class NumericMatch:
    """1 if the completion's last number is the answer within `tolerance`, else `any_number` if it
    has a number at all. A number may be a fraction of integers, such as 1/2."""

    tolerance: float = 0.0
    any_number: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= check_number("tolerance", self.tolerance) < math.inf:
            raise ConfigError.of("tolerance", f"must be 0 or more, and finite: {self.tolerance!r}")
        _check_finite("any_number", self.any_number)

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        found = _NUMBER.findall(completion)
        if not found:
            return 0.0
        answer = expected(meta).strip()
        told = _NUMBER.fullmatch(answer)
        if told is None:
            raise ValueError(f"the problem's answer {answer!r} is no number")
        try:
            right = _is_near(_parts(*found[-1]), _parts(*told.groups()), self.tolerance)
        except DecimalException:  # 1e999999999: wrong, and no failure of the reward
            right = False
        return 1.0 if right else self.any_number


def _parts(numerator: str, denominator: str | None) -> tuple[Decimal, Decimal]:
    """As decimals: 0.1 + 0.2 and 0.3 differ as floats."""
    return Decimal(numerator.replace(",", "")), Decimal((denominator or "1").replace(",", ""))


def _is_near(
    one: tuple[Decimal, Decimal], other: tuple[Decimal, Decimal], tolerance: float
) -> bool:
    """Whether |a / b − c / d| ≤ tolerance, without dividing; what has a divisor of 0 is not."""
    (a, b), (c, d) = one, other
    digits = sum(len(number.as_tuple().digits) for number in (a, b, c, d))
    with localcontext(prec=digits + _MORE_DIGITS):  # a difference in the last digit is one
        return bool(b and d) and abs(a * d - c * b) <= Decimal(str(tolerance)) * b * d


@register_reward("regex")
@dataclass(frozen=True)
class RegexMatch:
    """1 if the pattern is found in the completion; with `group`, if that group is the answer."""

    pattern: str
    group: int | str | None = None
    _compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(check_string("pattern", self.pattern), re.DOTALL)
        except re.error as error:
            raise ConfigError.of("pattern", f"is no regular expression: {error}") from error
        if isinstance(self.group, str):
            known = self.group in compiled.groupindex
        else:
            known = self.group is None or check_count("group", self.group) <= compiled.groups
        if not known:
            raise ConfigError.of("group", f"{self.group!r} is none of the pattern's groups")
        object.__setattr__(self, "_compiled", compiled)

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        found = self._compiled.search(completion)
        if found is None or self.group is None:
            return float(found is not None)
        return float((found[self.group] or "").strip() == expected(meta).strip())


@register_reward("json_schema")
@dataclass(frozen=True)
class JsonSchema:
    """1 if the completion is JSON that the schema takes, else `parses` if it is JSON at all.

    What is nested too deeply to be read is no JSON, and what is too deep or too large a number to
    be judged is not taken.
    """

    schema: Mapping[str, Any]
    parses: float = 0.0

    def __post_init__(self) -> None:
        try:
            from jsonschema.validators import validator_for
        except ImportError as error:
            raise MissingExtraError.of("the reward json_schema", "rlvr") from error
        try:
            validator_for(self.schema).check_schema(self.schema)
        except Exception as error:
            # The whole text of such an error has the schema of all schemas in it.
            problem = getattr(error, "message", error)
            raise ConfigError.of("schema", f"is no JSON schema: {problem}") from error
        _check_finite("parses", self.parses)

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        from jsonschema.validators import validator_for

        try:
            value = json.loads(completion, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        validator = validator_for(self.schema)(self.schema)
        try:
            valid = validator.is_valid(value)
        except (RecursionError, OverflowError):  # [[[…]]] and 1e999: no failure of ours
            valid = False
        return 1.0 if valid else self.parses


def _refuse_constant(name: str) -> None:
    """Python reads NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")


@register_reward("length")
@dataclass(frozen=True)
class Length:
    """1 up to `target` characters, and falling to 0 over the next `scale` ones."""

    target: int
    scale: int = 100

    def __post_init__(self) -> None:
        check_count("target", self.target)
        if check_count("scale", self.scale) < 1:
            raise ConfigError.of("scale", "must be 1 or more")

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        return min(1.0, max(0.0, 1 - (len(completion) - self.target) / self.scale))


@register_reward("keywords")
@dataclass(frozen=True)
class Keywords:
    """The share of the keywords that stand in the completion as words."""

    keywords: Sequence[str]
    ignore_case: bool = True

    def __post_init__(self) -> None:
        words = check_strings("keywords", self.keywords)
        if not words or not all(words):
            raise ConfigError.of("keywords", "must be a list of at least one word, none empty")
        check_bool("ignore_case", self.ignore_case)

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        flags = re.IGNORECASE if self.ignore_case else 0
        found = [
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", completion, flags) is not None
            for word in self.keywords
        ]
        return math.fsum(found) / len(found)


@register_reward("math_verify")
@dataclass(frozen=True)
class MathVerify:
    """1 if the completion's last formula equals the answer, as `math-verify` judges it.

    The answer may be a formula without `$` around it; one in which nothing can be read is an error.
    """

    def __call__(self, prompt: Any, completion: str, meta: Mapping[str, Any]) -> float:
        try:
            from math_verify import parse, verify
        except ImportError as error:
            raise MissingExtraError.of("the reward math_verify", "rlvr") from error
        answer = expected(meta)
        # Its own limits of time work by signals, in main threads only; ours kill the process.
        gold = next(
            (found for text in _as_formula(answer) if (found := parse(text, parsing_timeout=None))),
            None,
        )
        if gold is None:
            raise ValueError(f"nothing can be read in the problem's answer {answer!r}")
        given = parse(completion, parsing_timeout=None)
        return float(verify(gold, given, timeout_seconds=None))


def _as_formula(answer: str) -> tuple[str, ...]:
    """How an answer may be meant, the likeliest first: `math-verify` reads no formula without
    marks around it, and of some only the numbers."""
    if any(mark in answer for mark in _FORMULA_BEGINS):
        return (answer,)
    marked = f"${answer}$"
    return (marked, answer) if "\\" in answer else (answer, marked)
