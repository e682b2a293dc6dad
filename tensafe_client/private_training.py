"""Whole private training: step after step on batches that the server draws."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator

from tensafe_client.checks import check_count, check_number
from tensafe_client.errors import InvalidArgumentError
from tensafe_client.futures import OperationFuture
from tensafe_client.operations import RunOperations
from tensafe_client.results import OptimStepResult

Rate = float | Callable[[int], float] | None
OnStep = Callable[[OptimStepResult], None] | None
_AHEAD = 32


class PrivateSteps:
    """Submits private steps, some ahead.

    Args:
        run: the run, with sampling="server_poisson".
        steps: how many.
        learning_rate: of all, or a schedule: a function of the update's number.
    """

    def __init__(self, run: RunOperations, steps: int, learning_rate: Rate) -> None:
        self._run = run
        self._steps = check_count("steps", steps)
        if learning_rate is not None and not callable(learning_rate):
            check_number("learning_rate", learning_rate)
        self._learning_rate = learning_rate

    def __iter__(self) -> Generator[OptimStepResult, None, None]:
        """Waits for each in turn; closed early, it cancels what has not begun."""
        for future in self._futures():
            yield future.result()

    async def __aiter__(self) -> AsyncIterator[OptimStepResult]:
        """Awaits each in turn."""
        for future in self._futures():
            yield await future

    def _futures(self) -> Iterator[OperationFuture[OptimStepResult]]:
        first = self._run.step + 1
        waiting: deque[OperationFuture[OptimStepResult]] = deque()
        try:
            for number in range(first, first + self._steps):
                waiting.append(self._run.private_step(self._rate(number)))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for future in waiting:  # what failed would fail again
                future.cancel()

    def _rate(self, number: int) -> float | None:
        return self._learning_rate(number) if callable(self._learning_rate) else self._learning_rate


def check_on_step(on_step: object) -> None:
    """Raises InvalidArgumentError for what cannot be called."""
    if on_step is not None and not callable(on_step):
        raise InvalidArgumentError.of("on_step", f"must be a function, got {on_step!r}")
