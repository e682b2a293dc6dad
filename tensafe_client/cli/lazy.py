"""A click group whose commands are imported when they are called, not before."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Any

import click


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is, and what its parent's help says of it.

    Attributes:
        path: `module:attribute`.
        summary: one line for the list of commands.
        extra: the extra of the distribution that it needs; empty for none.
        serves: whether it runs until SIGTERM, and then ends with 0.
    """

    path: str
    summary: str
    extra: str = ""
    serves: bool = False

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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        lazy = self._lazy.get(args[0])
        if lazy is None or not lazy.serves:
            return super().resolve_command(ctx, args)
        with _ending_on_sigterm(ctx):
            return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in self._lazy.items()])


@contextmanager
def _ending_on_sigterm(ctx: click.Context) -> Iterator[None]:
    """From the import of a command on, SIGTERM ends the process with 0.

    The server's own handler replaces this one when it stands; the context's end takes it back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Nothing runs yet, and an exception in the midst of an import may be swallowed.
    before = signal.signal(signal.SIGTERM, _end_at_once)
    ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, before or signal.SIG_DFL))
    yield
    signal.signal(signal.SIGTERM, _end)


def _end_at_once(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def examples(*lines: str) -> Callable[[click.Command], click.Command]:
    """Adds an `Examples:` part to a command's help, shown as written."""

    def add(command: click.Command) -> click.Command:
        command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
        return command

    return add
