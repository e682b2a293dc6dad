"""Which passes are captured: those of sizes that come again, the rest run as written."""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakValueDictionary

from workers.engine.base_model import BaseModel
from workers.engine.graphs.captured import PLAIN_ROWS, CapturedPass, Member, Size
from workers.engine.graphs.frames import Frame
from workers.engine.graphs.tapes import CudaTape, Tape
from workers.engine.measuring import free_bytes
from workers.engine.memory import can_spare, is_memory_error
from workers.engine.ragged_attention import has_ragged_kernel
from workers.operations import Int64

log = logging.getLogger(__name__)

_WORTH = 3
"""Times that a size has come before it is captured, which takes as long as some passes; twice as
often whenever there was no memory for it."""
_MOST = 48
_MOST_COUNTED = 4096
_LEAST_TOKENS = _LEAST_LONGEST = 64
_STEPS = 8
"""Sizes between one power of two and the next: at most an eighth is padding."""
_RANK_STEP = 8
"""`grouped_mm` wants strides of 16 bytes."""
_MOST_TOKENS = 8192
_BUDGET_SHARE = 5
_FRAME_SHARE = 1 / 16


class Graphs:
    """The captured passes of one model, those that were used last.

    Args:
        tape: makes what captures; a new one after memory was given back.
        most_tokens: of a pass; longer ones keep the device busy as they are.
        most_bytes: that they may hold beside what the tape holds: adapters' rows above all. Where
            rows that fit just so are of adapters of other layouts, one goes beyond it alone.

    Attributes:
        held: the captured passes, the one used last at the end.
    """

    def __init__(
        self, model: BaseModel, tape: Callable[[], Tape], most_tokens: int, most_bytes: int
    ) -> None:
        self._model, self._make_tape = model, tape
        self._most_tokens, self._most_bytes = most_tokens, most_bytes
        self._tape = tape()
        self._worth = _WORTH
        self._most_runs: float = math.inf
        self.held: OrderedDict[Size, CapturedPass] = OrderedDict()
        self._frames: WeakValueDictionary[tuple[int, tuple[str, ...], int], Frame] = (
            WeakValueDictionary()
        )
        self._seen: Counter[Size] = Counter()
        can_spare(self)

    def load(
        self,
        numbers: Int64,
        lengths: Sequence[int],
        members: Sequence[Member],
        *,
        trains: bool,
        exact: bool = False,
        frugal: bool = False,
    ) -> CapturedPass | None:
        """A pass of this size with this one in its place; None for one that runs as written.

        An exact one never does: captured or not, it is the same kernels on the same shapes.

        Args:
            numbers, lengths, members: as `CapturedPass.load` takes them.
            exact: its bits may not depend on what else there is or was.
            frugal: there is no memory to keep activations.
        """
        size = size_of(numbers, lengths, members, trains=trains, exact=exact)
        fits = size.tokens <= self._most_tokens and size.runs <= self._most_runs
        found = self._prepared(size, numbers, lengths, members) if fits and not frugal else None
        if found is not None or not exact:
            return found
        direct = CapturedPass(self._model, size, self._new_frame(size), frugal=frugal)
        direct.load(numbers, lengths, members)
        return direct

    def _prepared(
        self, size: Size, numbers: Int64, lengths: Sequence[int], members: Sequence[Member]
    ) -> CapturedPass | None:
        try:
            captured = self._find(size)
            if captured is not None:
                captured.load(numbers, lengths, members)
                while len(self.held) > 1 and self._held_bytes() > self._most_bytes:
                    self._let_go()
                captured.record()
        except Exception as error:
            self._failed(size, error)
            return None
        return captured

    def _failed(self, size: Size, error: Exception) -> None:
        """One of that size could not be captured, which says nothing against it as written."""
        self.release()
        name = self._model.name
        if is_memory_error(error):
            log.info("%s: there is no memory to capture a pass of %d tokens", name, size.tokens)
            self._worth *= 2
            return
        # An adapter alone needs no product of several.
        self._most_runs = 1 if size.runs > 1 else 0
        several = "several runs on " * (size.runs > 1)
        log.warning(
            "passes of %s%s cannot be captured and run as written: %s", several, name, error
        )

    def _find(self, size: Size) -> CapturedPass | None:
        if size in self.held:
            self.held.move_to_end(size)
            return self.held[size]
        self._seen[size] += 1
        if self._seen[size] < self._worth:
            if len(self._seen) > _MOST_COUNTED:
                self._seen.clear()
            return None
        frame = self._frame(size)
        if frame is None:
            return None
        self.held[size] = CapturedPass(self._model, size, frame, self._tape)
        if len(self.held) > _MOST:
            self._let_go()
        return self.held[size]

    def _let_go(self) -> None:
        """Of the one used longest ago. Its size has to come as often again as a new one: where few
        of those that come in turn can be held, not each of them is captured."""
        size, _ = self.held.popitem(last=False)
        del self._seen[size]

    def release(self) -> None:
        """Gives their memory back. Sizes that go on coming are captured again."""
        if self.held:
            log.info("%s: %d captured passes are released", self._model.name, len(self.held))
        self.held.clear()
        self._seen.clear()
        self._tape = self._make_tape()

    def _frame(self, size: Size) -> Frame | None:
        key = (size.rank, size.targets, size.runs)
        frame = self._frames.get(key)
        if frame is not None:
            return frame
        wanted = Frame.bytes_of(
            self._model.layers, size.targets, size.rank, size.runs, self._model.dtype
        )
        if wanted > self._most_bytes:
            return None
        while self.held and wanted + self._held_bytes() > self._most_bytes:
            self._let_go()
        frame = self._frames[key] = self._new_frame(size)
        return frame

    def _new_frame(self, size: Size) -> Frame:
        model = self._model
        return Frame(model.layers, size.targets, size.rank, size.runs, model.device, model.dtype)

    def _held_bytes(self) -> int:
        frames, passes = self._frames.values(), self.held.values()
        return sum(frame.nbytes for frame in frames) + sum(each.nbytes for each in passes)


def graphs_of(model: BaseModel, token_budget: int, models: int = 1) -> Graphs | None:
    """Those of a model on a GPU that has what captured passes are made of; else None.

    Args:
        token_budget: most tokens of a pass; captured ones have at most a fifth, since what they
            take is theirs for good: a 16th of the memory, as are the adapters' rows.
        models: that share the device, and those two 16ths.
    """
    width = max(max(shape.key_size, shape.value_size) for shape in model.layer_shapes)
    if not has_ragged_kernel(model.head.weight.device, model.dtype, width):
        return None
    most_tokens = min(_MOST_TOKENS, token_budget // (_BUDGET_SHARE * models))
    most_bytes = int(_FRAME_SHARE * free_bytes(model.device)) // models
    tape = partial(CudaTape, model.device)
    return Graphs(model, tape, most_tokens, most_bytes)


def size_of(
    numbers: Int64,
    lengths: Sequence[int],
    members: Sequence[Member],
    *,
    trains: bool,
    exact: bool = False,
) -> Size:
    """What a pass is rounded up to."""
    settings = [member.adapter.settings for member in members]
    longest = _power(max(_LEAST_LONGEST, *lengths))
    tokens = sum(lengths)
    step = max(_LEAST_TOKENS, _power(tokens) // (2 * _STEPS))
    tokens = -(-tokens // step) * step
    padding = 1 + step // longest
    rank = max(lora.rank for lora in settings)
    targets = {name for lora in settings for name in lora.target_modules}
    return Size(
        tokens=tokens,
        documents=_power(len(lengths) + padding),
        longest=longest,
        runs=_power(len(members)),
        rank=-(-rank // _RANK_STEP) * _RANK_STEP,
        targets=tuple(sorted(targets)),
        drops=len(numbers) > PLAIN_ROWS,
        trains=trains,
        exact=exact,
    )


def _power(number: int) -> int:
    """The least power of two from it on."""
    return 1 << max(0, number - 1).bit_length()
