"""Options of `tensafe worker` that `tensafe up` takes too, and hands to each of its workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_SEE = "Given to every worker: see `tensafe worker --help`."
_ABOVE_0 = click.FloatRange(min=0, min_open=True)
_AT_LEAST_1 = click.IntRange(min=1)

_COMPUTING: dict[str, dict[str, Any]] = {
    "--pass-tokens": {"type": _AT_LEAST_1},
    "--run-memory-mib": {"type": _ABOVE_0},
    "--sample-memory-mib": {"type": _ABOVE_0},
    "--loss": {"multiple": True, "metavar": "NAME[=MODULE:FUNCTION]"},
    "--compile": {"type": click.Choice(["auto", "first", "off"])},
    "--cuda-graphs": {"type": click.Choice(["auto", "off"])},
}
"""What the mock backend has no use for."""
_ALL: dict[str, dict[str, Any]] = {
    "--group-tokens": {"type": click.IntRange(min=0)},
    "--threads": {"type": _AT_LEAST_1},
    **_COMPUTING,
    "--operation-limit-s": {"type": _ABOVE_0},
    "--token-limit-ms": {"type": click.FloatRange(min=0)},
}


def given_to_workers(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options, and gives the command those that were set as `worker_options`, a list of
    arguments."""

    @functools.wraps(command)
    def with_options(backend: str, **options: Any) -> None:
        found: list[str] = []
        for name in _ALL:
            value = options.pop(_parameter(name))
            for one in value if isinstance(value, tuple) else [value]:
                if one is None:
                    continue
                if backend == "mock" and name in _COMPUTING:
                    raise click.UsageError(f"the mock backend computes nothing; leave {name} out")
                found += [name, str(one)]
        command(backend=backend, worker_options=found, **options)

    for name, kind in reversed(_ALL.items()):
        add = click.option(name, _parameter(name), help=_SEE, **kind)
        with_options = add(with_options)
    return with_options


def _parameter(name: str) -> str:
    return "worker_" + name.removeprefix("--").replace("-", "_")
