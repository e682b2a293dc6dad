"""Checks of arguments and configuration: right name, right type, an error that names the field."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tensafe_client.errors import ConfigError


def check_fields(what: str, given: Mapping[str, Any], config: type[Any], path: str = "") -> None:
    """Refuses names that are not fields of the dataclass `config`.

    Raises:
        ConfigError: naming the first such field and the closest valid one.
    """
    valid = [f.name for f in fields(config) if f.init]
    for name in given:
        if name in valid:
            continue
        close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"its fields are {', '.join(valid)}"
        shown = f"{path}{name}"
        raise ConfigError(
            f"{what} has no field {shown!r}; {hint}", violations=[(shown, "unknown field")]
        )


def check_string(field: str, value: object) -> str:
    """Returns a string that UTF-8 can hold, or raises ConfigError."""
    if not isinstance(value, str):
        raise _wrong(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        text = f"has half of a surrogate pair at character {error.start}, which UTF-8 cannot hold"
        raise ConfigError.of(field, text) from None
    return value


def check_bool(field: str, value: object) -> bool:
    """Returns a bool, or raises ConfigError."""
    if not isinstance(value, bool):
        raise _wrong(field, "True or False", value)
    return value


def check_count(field: str, value: object, *, bits: int = 32) -> int:
    """Returns an integer that fits an unsigned field of `bits`, or raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(field, "an integer", value)
    number = int(value)
    if not 0 <= number < 2**bits:
        raise _wrong(field, f"an integer from 0 to 2^{bits} - 1", value)
    return number


def check_number(field: str, value: object) -> float:
    """Returns a real number as float, or raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(field, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise _wrong(field, "a number below 1.8e308", value) from None


def check_seconds(field: str, value: object) -> float:
    """Returns a time in seconds, 0 or more and maybe infinite, or raises ConfigError."""
    number = check_number(field, value)
    if not number >= 0:
        raise _wrong(field, "0 or more seconds", value)
    return number


def check_path(field: str, value: object) -> Path:
    """Returns a path, or raises ConfigError."""
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and "\0" not in path:
            return Path(path)
    raise _wrong(field, "a path", value)


def check_strings(field: str, value: object) -> list[str]:
    """Returns a list of strings, or raises ConfigError."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(field, "a list of strings", value)
    return [check_string(f"{field}[{i}]", item) for i, item in enumerate(value)]


def check_pair(field: str, value: object) -> tuple[float, float]:
    """Returns two numbers, or raises ConfigError."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise _wrong(field, "two numbers", value)
    return check_number(f"{field}[0]", value[0]), check_number(f"{field}[1]", value[1])


def _wrong(field: str, expected: str, value: object) -> ConfigError:
    return ConfigError.of(field, f"must be {expected}, got {value!r}")
