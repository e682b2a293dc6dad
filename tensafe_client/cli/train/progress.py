"""How `tensafe train` shows what happens: a live line, plain lines or NDJSON."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import click

from tensafe_client.cli.output import print_line

_WINDOW_STEPS = 10
_BAR_WIDTH = 20
_ERASE_LINE = "\r\x1b[K"


@dataclass(frozen=True)
class Step:
    """One applied update, as the training loop saw it.

    Attributes:
        step: applied updates of the run.
        total_steps: where the command ends.
        loss: weighted mean over the step's scored tokens.
        grad_norm: of the applied gradient, before clipping.
        learning_rate: step size used.
        tokens: tokens read.
    """

    step: int
    total_steps: int
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int


@dataclass(frozen=True)
class Pace:
    """How fast it goes: over the last steps, waiting included.

    Attributes:
        tokens_per_second: tokens read; None before the second step.
        eta_s: seconds until the last step; None before the second step.
    """

    tokens_per_second: float | None
    eta_s: float | None


class PaceMeter:
    """Measures the pace of the last ten steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW_STEPS + 1)

    def start(self) -> None:
        """Marks the moment before the first step."""
        self._marks.append((self._clock(), 0))

    def measure(self, step: Step) -> Pace:
        """Marks the end of a step."""
        self._marks.append((self._clock(), step.tokens))
        elapsed_s = self._marks[-1][0] - self._marks[0][0]
        steps = len(self._marks) - 1
        if steps < 1 or elapsed_s <= 0:
            return Pace(None, None)
        tokens = sum(count for _, count in list(self._marks)[1:])
        remaining = step.total_steps - step.step
        return Pace(tokens / elapsed_s, remaining * elapsed_s / steps)


class Progress(Protocol):
    """What the training loop reports to."""

    def on_start(self, run_id: str, step: int, total_steps: int) -> None: ...
    def on_step(self, step: Step) -> None: ...
    def on_eval(self, step: int, loss: float, scored_tokens: int) -> None: ...
    def on_saved(self, step: int, artifact_id: str) -> None: ...
    def on_notice(self, text: str) -> None: ...


class PlainProgress:
    """One line for each thing that happens."""

    def __init__(self) -> None:
        self._pace = PaceMeter()

    def on_start(self, run_id: str, step: int, total_steps: int) -> None:
        click.echo(f"run {run_id}: steps {step + 1} to {total_steps}")
        self._pace.start()

    def on_step(self, step: Step) -> None:
        pace = self._pace.measure(step)
        grad_norm = "" if step.grad_norm is None else f"  grad_norm {step.grad_norm:.3f}"
        click.echo(
            f"step {step.step}/{step.total_steps}  loss {step.loss:.4f}{grad_norm}  "
            f"lr {step.learning_rate:.3g}  {describe(pace)}"
        )

    def on_eval(self, step: int, loss: float, scored_tokens: int) -> None:
        click.echo(f"step {step}  held-out loss {loss:.4f}  ({scored_tokens} scored tokens)")

    def on_saved(self, step: int, artifact_id: str) -> None:
        click.echo(f"step {step}  saved {artifact_id}")

    def on_notice(self, text: str) -> None:
        click.echo(text)


class LiveProgress(PlainProgress):
    """One line that is drawn over itself; everything but steps stays above it."""

    def on_step(self, step: Step) -> None:
        pace = self._pace.measure(step)
        share = min(1.0, step.step / step.total_steps)
        filled = round(share * _BAR_WIDTH)
        bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
        text = (
            f"{bar} {step.step}/{step.total_steps}  loss {step.loss:.4f}  "
            f"lr {step.learning_rate:.2g}  {describe(pace)}"
        )
        width = shutil.get_terminal_size().columns - 1
        ended = step.step >= step.total_steps
        click.echo(_ERASE_LINE + text[:width], nl=ended, color=True)
        sys.stdout.flush()

    def on_eval(self, step: int, loss: float, scored_tokens: int) -> None:
        self._above()
        super().on_eval(step, loss, scored_tokens)

    def on_saved(self, step: int, artifact_id: str) -> None:
        self._above()
        super().on_saved(step, artifact_id)

    def on_notice(self, text: str) -> None:
        self._above()
        super().on_notice(text)

    def _above(self) -> None:
        click.echo(_ERASE_LINE, nl=False, color=True)


class JsonProgress:
    """One JSON object on each line; `event` says what it is."""

    def __init__(self) -> None:
        self._pace = PaceMeter()

    def on_start(self, run_id: str, step: int, total_steps: int) -> None:
        print_line({"event": "start", "run_id": run_id, "step": step, "total_steps": total_steps})
        self._pace.start()

    def on_step(self, step: Step) -> None:
        print_line({"event": "step", **asdict(step), **asdict(self._pace.measure(step))})

    def on_eval(self, step: int, loss: float, scored_tokens: int) -> None:
        print_line({"event": "eval", "step": step, "loss": loss, "scored_tokens": scored_tokens})

    def on_saved(self, step: int, artifact_id: str) -> None:
        print_line({"event": "saved", "step": step, "artifact_id": artifact_id})

    def on_notice(self, text: str) -> None:
        click.echo(text, err=True)


def choose_progress(as_json: bool) -> Progress:
    """NDJSON on request, a live line on a terminal, plain lines elsewhere."""
    if as_json:
        return JsonProgress()
    return LiveProgress() if sys.stdout.isatty() else PlainProgress()


def describe(pace: Pace) -> str:
    """`842 tokens/s  ETA 1:23`."""
    if pace.tokens_per_second is None or pace.eta_s is None:
        return "ETA -:--"
    minutes, seconds = divmod(round(pace.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{pace.tokens_per_second:.0f} tokens/s  ETA {eta}"
