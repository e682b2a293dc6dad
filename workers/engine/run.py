"""A run on this worker: all that its operations change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.engine.adapters import Adapter
from workers.engine.base_model import BaseModel
from workers.engine.optimizers import RunOptimizer
from workers.engine.privacy.runs import PrivateRun
from workers.operations import RunSettings
from workers.window import Window


@dataclass
class Run:
    """A run's whole state.

    Attributes:
        accumulator: float32 [P], the summed gradient of the open window; None while it is closed.
        seed: fixes dropout and sampling; the configuration's, or that of a loaded state.
        backwards: forward_backward calls that took effect, over the run's whole life. It counts
            the "logical operation" of the dropout masks, and travels with the state, so that a
            restored run goes on with the masks that it would have had.
        private: of a private run; None else.
        unit_tokens: what the gradient of one unit takes of a pass's tokens.
    """

    run_id: str
    settings: RunSettings
    model: BaseModel
    adapter: Adapter
    optimizer: RunOptimizer
    window: Window
    seed: int
    accumulator: Tensor | None = None
    backwards: int = 0
    private: PrivateRun | None = None
    unit_tokens: int = 0

    def drop_window(self) -> None:
        """Forgets the open window, poisoned or not, and what it holds."""
        self.window.clear()
        self.accumulator = None
        if self.private is not None:
            self.private.clear()
