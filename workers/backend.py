"""What the executor drives: one class per kind of worker, `mock` and `torch`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from tensafe.wire.losses import LossCard
from tensafe.wire.status import TenSafeFault
from workers.operations import (
    LoadOutcome,
    LossOutcome,
    LossRequest,
    ModelCard,
    RunSettings,
    SampleOutcome,
    SampleRequest,
    SaveOutcome,
    StepOutcome,
    StepRequest,
)
from workers.sampler import Sampler

_ALONE = "alone"

P = ParamSpec("P")
T = TypeVar("T")


class NoisedFault(TenSafeFault):
    """A private step that failed after its noise was added.

    That it failed tells something of the noised sum, so what the step costs is spent. A step that
    fails in another way has cost nothing.
    """

    def __init__(self, fault: TenSafeFault) -> None:
        Exception.__init__(self, str(fault))
        self.detail = fault.detail


class Captured(Protocol):
    """A run's whole state at one moment, apart from the run, which may go on."""

    @property
    def step(self) -> int:
        """Applied updates."""

    def write(self, directory: Path) -> None:
        """Writes what `open_run` takes into an empty directory; from any thread."""


class Backend(ABC):
    """Holds runs and executes operations on them, from one thread.

    Every method may raise `TenSafeFault` for a known reason. Whatever it raises, no other run is
    touched, and the run itself takes its next operation; a failed `forward_backward` has poisoned
    the run's accumulation window.

    Attributes:
        name: `torch` or `mock`.
        device: `cpu`, `cuda:0`, ….
        credits: most operations that may wait with this worker.
        group_tokens: most tokens that it gains by executing together, for different runs'
            operations of one kind; 0: it gains nothing.
        sample_tokens: most tokens, of prompts and completions, that its sampler holds at once; 0:
            it samples in no time.
        instant: operations take microseconds, so starts are not worth a report.
    """

    name: str
    device: str
    credits: int
    group_tokens: int = 0
    sample_tokens: int = 0
    instant: bool = False

    @property
    def thread_is_spoiled(self) -> bool:
        """Whether the thread that asks had better call nothing more; another one may."""
        return False

    @abstractmethod
    def models(self) -> Sequence[ModelCard]:
        """The base models that runs may be opened on."""

    @abstractmethod
    def losses(self) -> Sequence[LossCard]:
        """What may be minimised on each of them."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What results depend on: versions, instruction set, threads."""

    @abstractmethod
    def open_run(self, run_id: str, settings: RunSettings, state: Path | None) -> None:
        """Takes on a run: fresh, or from the artifact's files in `state`. One that is already
        held is replaced."""

    @abstractmethod
    def close_run(self, run_id: str) -> None:
        """Forgets a run; an unknown one is no error."""

    @abstractmethod
    def poison(self, run_id: str) -> None:
        """Marks the accumulation window: a forward_backward that belongs to it did not run."""

    @abstractmethod
    def drop_window(self, run_id: str) -> None:
        """Closes the accumulation window without an update: what it holds is gone."""

    @abstractmethod
    def forward(self, run_id: str, request: LossRequest) -> LossOutcome:
        """Loss and outputs; changes nothing. Without dropout, unless the request asks for the
        masks of the next `forward_backward`."""

    @abstractmethod
    def forward_backward(self, run_id: str, seq: int, request: LossRequest) -> LossOutcome:
        """As `forward`, with dropout; adds the gradient to the accumulation window."""

    def forward_backward_group(
        self, entries: Sequence[tuple[str, int, LossRequest]]
    ) -> list[LossOutcome | Exception]:
        """Several at once, for a backend that gains by it.

        Args:
            entries: run, seq and batch, of different runs on one base model; that of a
                deterministic run comes alone. Outcomes and failures are each entry's own.
        """
        return [_outcome(self.forward_backward, *entry) for entry in entries]

    @abstractmethod
    def optim_step(self, run_id: str, request: StepRequest) -> StepOutcome:
        """Closes a call of the window; the call that closes the window changes the weights.

        Raises:
            NoisedFault: of a private run, what was noised is spent.
        """

    def private_step(
        self, run_id: str, seq: int, batches: Iterable[LossRequest], request: StepRequest
    ) -> StepOutcome:
        """A whole window of a private run, of these batches, if any, and its update."""
        self.drop_window(run_id)
        try:
            for batch in batches:
                self.forward_backward(run_id, seq, batch)
            return self.optim_step(run_id, replace(request, closes=True))
        except BaseException:
            self.drop_window(run_id)
            raise

    def optim_step_group(
        self, entries: Sequence[tuple[str, StepRequest]]
    ) -> list[StepOutcome | Exception]:
        """Several at once, of different runs."""
        return [_outcome(self.optim_step, *entry) for entry in entries]

    @property
    @abstractmethod
    def sampler(self) -> Sampler:
        """What generates text, always the same one. Training may go on between its steps."""

    def sample(self, key: str | int, request: SampleRequest) -> SampleOutcome:
        """Generates text from beginning to end, while nothing else does.

        Args:
            key: as `Sampler.submit` takes it.
        """
        sampler = self.sampler
        sampler.submit(_ALONE, key, request)
        try:
            while not (ended := sampler.collect()):
                sampler.step()
        finally:
            sampler.cancel(_ALONE)
        ((operation_id, outcome),) = ended
        if operation_id != _ALONE:
            raise RuntimeError(f"operation {operation_id} was being sampled")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @abstractmethod
    def save_state(self, run_id: str, directory: Path, include_optimizer: bool) -> SaveOutcome:
        """Writes the run's adapter, and on request all of its state, into an empty directory."""

    @abstractmethod
    def capture(self, run_id: str) -> Captured:
        """Copies the run's whole state, in memory only: training waits for no disk."""

    @abstractmethod
    def load_state(
        self, run_id: str, directory: Path, include_optimizer: bool | None
    ) -> LoadOutcome:
        """Replaces the run's weights, or all of its state, by an artifact's.

        Weights alone (`include_optimizer` False, or an artifact without more) drop the open
        accumulation window: its gradient belongs to the weights that are gone.
        """


def _outcome(method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | TenSafeFault:
    try:
        return method(*args, **kwargs)
    except TenSafeFault as fault:
        return fault
