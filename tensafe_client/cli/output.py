"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, TypeVar

import click
import numpy as np

from tensafe_client.errors import TenSafeError

F = TypeVar("F", bound=Callable[..., Any])


def json_option(command: F) -> F:
    """Gives a command the flag --json, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(
        command
    )


def to_jsonable(value: Any) -> Any:
    """A result of the SDK as what `json` can write: times become ISO 8601, arrays lists, and of the
    numbers that JSON lacks NaN null and ±∞ "Infinity" and "-Infinity", as protobuf has them."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: to_jsonable(item) for name, item in named.items()}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return to_jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else _unwritable(value)
    return _scalar(value)


def _unwritable(value: float) -> str | None:
    if math.isnan(value):
        return None
    return "Infinity" if value > 0 else "-Infinity"


def _scalar(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, TenSafeError):
        return {"code": value.code, "reason": value.reason, "message": value.message}
    return value


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints one JSON document."""
    click.echo(json.dumps(to_jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False))


def print_line(value: Any) -> None:
    """Prints one line of NDJSON."""
    print_json(value, indent=None)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints aligned columns; a list without rows says so."""
    texts = [[_cell(value) for value in row] for row in rows]
    if not texts:
        click.echo("(none)")
        return
    widths = [max(len(row[i]) for row in [list(header), *texts]) for i in range(len(header))]
    for row in [list(header), *texts]:
        click.echo(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


def print_fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Prints `name  value` lines, aligned."""
    texts = [(name, _cell(value)) for name, value in pairs]
    width = max(len(name) for name, _ in texts)
    for name, text in texts:
        click.echo(f"{name.ljust(width)}  {text}")


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return "".join(map(_visible, str(value)))


def _visible(character: str) -> str:
    """What a terminal would obey, as its escape: names and texts may be anybody's."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def size(size_bytes: int) -> str:
    """A size in bytes for people."""
    amount, units = float(size_bytes), ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if amount < 1024 or unit == units[-1]:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError
