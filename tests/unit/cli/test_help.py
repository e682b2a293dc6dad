"""Every command explains itself, and docs/cli.md knows every command and exit status."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tensafe_client import errors
from tensafe_client.cli.failures import DOES_NOT_REPRODUCE, INTERRUPTED, SERVICE_FAULT, exit_status
from tensafe_client.cli.main import COMMANDS, main

PAGE = (Path(__file__).parents[3] / "docs/cli.md").read_text()


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = list(commands(main))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_explains_and_shows_examples(path: tuple[str, ...]):
    shown = CliRunner().invoke(main, [*path, "--help"])
    assert shown.exit_code == 0, shown.output
    if path in {("server",), ("worker",)}:  # parts of `up`, whose help has the examples
        return
    assert "Examples:" in shown.output
    assert f"tensafe {' '.join(path)}" in shown.output.split("Examples:")[1]


def test_the_root_lists_every_command_without_importing_it():
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary[:30])}", shown.output, re.M)


def test_the_page_names_every_command():
    listing = PAGE.split("```")[1]
    for path in ALL:
        assert all(re.search(rf"\b{word}\b", listing) for word in path), path


def leaf_errors(kind: type[errors.TenSafeError]) -> Iterator[type[errors.TenSafeError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from leaf_errors(child)


def test_the_page_names_every_exit_status():
    documented = {int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.M)}
    used = {exit_status(kind("text")) for kind in leaf_errors(errors.TenSafeError)}
    assert documented == used | {0, 1, 2, INTERRUPTED, SERVICE_FAULT, DOES_NOT_REPRODUCE}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConnectionFailedError("x"), 3),
        (errors.AuthenticationError("x"), 4),
        (errors.RunNotFoundError("x"), 5),
        (errors.ConfigError("x"), 6),
        (errors.TokenOutOfRangeError("x"), 6),
        (errors.WindowPoisonedError("x"), 7),
        (errors.SequenceConflictError("x"), 7),
        (errors.QueueFullError("x"), 8),
        (errors.OperationCancelledError("x"), 9),
        (errors.ServerError("x"), 10),
    ],
)
def test_exit_status_by_cause(error: errors.TenSafeError, status: int):
    assert exit_status(error) == status


def test_an_error_is_one_message_without_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TENSAFE_CONFIG", str(tmp_path / "none.toml"))
    monkeypatch.delenv("TENSAFE_TARGET", raising=False)
    shown = CliRunner().invoke(main, ["runs", "list"])
    assert shown.exit_code == 6
    assert "tensafe up" in shown.stderr
    assert shown.stdout == ""
