"""A click group whose commands are imported when they are called, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is, and what its parent's help says of it.

    Attributes:
        path: `module:attribute`.
        summary: one line for the list of commands.
        extra: the extra of the distribution that it needs; empty for none.
    """

    path: str
    summary: str
    extra: str = ""

    def load(self, name: str) -> click.Command:
        """Imports the command.

        Raises:
            click.ClickException: if the extra that it needs is not installed.
        """
        module, _, attribute = self.path.partition(":")
        try:
            command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            raise click.ClickException(
                f"`tensafe {name}` needs the module {error.name!r}, which is not installed. "
                f"Install it: pip install 'tensafe[{self.extra}]'"
            ) from error
        assert isinstance(command, click.Command)
        return command


class LazyGroup(click.Group):
    """A group made of LazyCommands; its own help imports none of them."""

    def __init__(self, *args: Any, lazy_commands: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy_commands)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = self._lazy.get(cmd_name)
        return None if lazy is None else lazy.load(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in self._lazy.items()])


def examples(*lines: str) -> Callable[[click.Command], click.Command]:
    """Adds an `Examples:` part to a command's help, shown as written."""

    def add(command: click.Command) -> click.Command:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
        return command

    return add
