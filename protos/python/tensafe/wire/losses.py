"""How a loss is described, and whether a call fits it: the same rules on both sides of the wire.

A card says what a loss takes and gives. Workers publish the cards of what they can compute, the
coordinator checks calls by them, and the worker checks again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tensafe.wire.status import TenSafeFault

Value = float | str | bool | None
"""What an option may have; None: no value."""


class Reduction(StrEnum):
    """How the terms of a loss become the number that is minimised; see the proto."""

    TOKEN_MEAN = "token_mean"  # noqa: S105 - no password
    SEQUENCE_MEAN = "sequence_mean"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class LossInput:
    """A tensor of a batch: one value for each token, or K if it is `wide` and given so.

    Attributes:
        dtype: `int32` or `float32`.
    """

    name: str
    description: str
    dtype: str = "float32"
    required: bool = True
    wide: bool = False


TARGET_TOKENS = LossInput("target_tokens", "the token to predict at each position", "int32")
WEIGHTS = LossInput(
    "weights", "multiply the terms; 0: not scored; not given: all 1", required=False
)


@dataclass(frozen=True, slots=True)
class Number:
    """An option with a finite number from `low` to `high`.

    Attributes:
        default: None: without a value, unless it is `required`.
    """

    name: str
    description: str
    default: float | None
    low: float
    high: float
    required: bool = False

    def check(self, value: object) -> str | None:
        """What is wrong with a value; None if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number, got {value!r}"
        if not math.isfinite(value) or not self.low <= value <= self.high:
            return f"must be from {self.low:g} to {self.high:g}, got {value!r}"
        return None


@dataclass(frozen=True, slots=True)
class Choice:
    """An option with one of several words."""

    name: str
    description: str
    default: str
    values: tuple[str, ...]
    required: bool = False

    def check(self, value: object) -> str | None:
        """What is wrong with a value; None if nothing is."""
        if value not in self.values:
            return f"must be one of {', '.join(self.values)}, got {value!r}"
        return None


@dataclass(frozen=True, slots=True)
class Flag:
    """An option that is true or false."""

    name: str
    description: str
    default: bool = False
    required: bool = False

    def check(self, value: object) -> str | None:
        """What is wrong with a value; None if nothing is."""
        return None if isinstance(value, bool) else f"must be true or false, got {value!r}"


LossOption = Number | Choice | Flag


@dataclass(frozen=True, slots=True)
class LossMetric:
    """A number that a loss defines; `combine` is `sum`, `mean`, `min` or `max`."""

    name: str
    combine: str
    description: str


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a loss tells of each token, or of each datum."""

    name: str
    description: str
    per_datum: bool = False


@dataclass(frozen=True, slots=True)
class ReferenceRule:
    """When a loss needs a reference: always, or only with an option, or without an input."""

    with_option: str = ""
    unless_input: str = ""
    may_be_none: bool = False


@dataclass(frozen=True, slots=True)
class LossCard:
    """What a loss is called, takes and gives; see the proto's `Loss`.

    Attributes:
        reductions: the default first.
        datums_together: of a batch, which are never split: 2 for pairs.
        divides_by_weights: its token mean divides by Σ weights, not by the scored tokens.
        reference: None: it never needs one.
    """

    name: str
    description: str
    source: str = ""
    inputs: tuple[LossInput, ...] = (TARGET_TOKENS, WEIGHTS)
    options: tuple[LossOption, ...] = ()
    reductions: tuple[Reduction, ...] = tuple(Reduction)
    metrics: tuple[LossMetric, ...] = ()
    outputs: tuple[LossOutput, ...] = ()
    datums_together: int = 1
    divides_by_weights: bool = False
    reference: ReferenceRule | None = None
    plug_in: bool = False
    _inputs: Mapping[str, LossInput] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_inputs", {item.name: item for item in self.inputs})

    def input(self, name: str) -> LossInput | None:
        """The input of this name."""
        return self._inputs.get(name)

    @property
    def _takes(self) -> str:
        return f"it takes {', '.join(self._inputs)}"

    def resolve_options(self, given: Mapping[str, object], field: str) -> dict[str, Value]:
        """Every option's value.

        Args:
            field: where the options stand, for the error.

        Raises:
            TenSafeFault: UNSUPPORTED_OPTION for unknown ones, else INVALID_ARGUMENT; each is named.
        """
        known = {option.name for option in self.options}
        unknown = [name for name in given if name not in known]
        if unknown:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"{self.name} has no option {unknown[0]!r}; {takes}",
                violations=[(f"{field}.{name}", "unknown") for name in unknown],
                loss=self.name,
            )
        broken: list[tuple[str, str]] = []
        values: dict[str, Value] = {}
        for option in self.options:
            if option.name in given:
                value: Any = given[option.name]
                if problem := option.check(value):
                    broken.append((option.name, problem))
                values[option.name] = value
            elif option.required:
                broken.append((option.name, "is required"))
            else:
                values[option.name] = option.default
        if broken:
            name, problem = broken[0]
            raise TenSafeFault(
                "INVALID_ARGUMENT",
                f"option {name} of {self.name} {problem}",
                violations=[(f"{field}.{name}", problem) for name, problem in broken],
                loss=self.name,
            )
        return values

    def check_inputs(self, given: Sequence[str], field: str) -> None:
        """Checks the names of a batch's inputs.

        Raises:
            TenSafeFault: INVALID_BATCH for one that is unknown, missing or given twice.
        """
        for index, name in enumerate(given):
            if name not in self._inputs:
                raise TenSafeFault(
                    "INVALID_BATCH",
                    f"loss input {name!r} is unknown to {self.name}; {self._takes}",
                    field=f"{field}[{index}]",
                    loss=self.name,
                )
            if name in given[:index]:
                raise TenSafeFault(
                    "INVALID_BATCH",
                    f"loss input {name!r} is given twice; send it once",
                    field=f"{field}[{index}]",
                    loss=self.name,
                )
        missing = [item.name for item in self.inputs if item.required and item.name not in given]
        if missing:
            raise TenSafeFault(
                "INVALID_BATCH",
                f"{self.name} needs the loss input {missing[0]!r}; {self._takes}",
                violations=[(field, f"{name} is missing") for name in missing],
                loss=self.name,
            )

    def resolve_reduction(self, given: Reduction | None, field: str) -> Reduction:
        """The reduction of a call, or the default.

        Raises:
            TenSafeFault: UNSUPPORTED_OPTION.
        """
        if given is None:
            return self.reductions[0]
        if given not in self.reductions:
            raise TenSafeFault(
                "UNSUPPORTED_OPTION",
                f"{self.name} has no reduction {str(given)!r}; it has {', '.join(self.reductions)}",
                field=field,
                loss=self.name,
            )
        return given

    def needs_reference(
        self, source: str | None, options: Mapping[str, Value], inputs: Collection[str], field: str
    ) -> bool:
        """Whether a call compares with a reference.

        Args:
            source: what it names: `base`, `artifact_id` or `none`; None for the default.
            options: resolved.
            inputs: names of those that are given.

        Raises:
            TenSafeFault: UNSUPPORTED_OPTION for a reference that would have no effect.
        """
        rule = self.reference
        if rule is None:
            needed, why = False, "compares with none"
        elif rule.with_option and options.get(rule.with_option) is None:
            needed, why = False, f"needs one with the option {rule.with_option} only; give that too"
        elif rule.unless_input and rule.unless_input in inputs:
            needed, why = False, f"has the input {rule.unless_input} instead; leave one of them out"
        else:
            needed, why = True, ""
        if source is not None and not needed:
            problem = f"{self.name} {why}"
        elif source == "none" and rule is not None and not rule.may_be_none:
            problem = f"{self.name} cannot do without one; name base or an artifact"
        else:
            return needed and source != "none"
        raise TenSafeFault("UNSUPPORTED_OPTION", f"reference: {problem}", field=field)


def no_such_loss(name: str, known: Collection[str], field: str) -> TenSafeFault:
    """The refusal of a loss that nobody has."""
    return TenSafeFault(
        "UNSUPPORTED_OPTION",
        f"no loss {name!r}; there is {', '.join(sorted(known))}",
        field=field,
        loss=name,
    )
