"""Rows of deterministic runs: the same bits whatever else the worker does.

Numbers of a row depend on its company in two ways: how a library cuts a product depends on the
product's shape, and so may the order of a sum; and attention padded to the longest row sums more
terms. So such rows are decoded apart from all others, in tiles of a fixed number of rows that ended
or missing rows keep filling; a row's place in its tile is its place in its operation, modulo the
tile's size. In a product of fixed shape each row of the output is a function of that row of the
input alone. What is not a product over all rows is computed for each row by itself: prompts,
attention, draws (`tests/parity/test_sampling_determinism.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

from workers.engine.base_model import BaseModel
from workers.engine.sampling.distribution import Drawn, Workspace, draw
from workers.engine.sampling.passes import Document, decode, logits_of, prefill
from workers.engine.sampling.row_adapters import RowAdapters
from workers.engine.sampling.rows import Job, Row

TILE = 16
"""Rows of a tile. More would gain little on a CPU, fewer would cost nearly as much each."""


class Tile:
    """Rows of one operation, each with a place of its own in the cache.

    Args:
        rows: at most TILE, in the operation's order.
        adapters: of another tile that goes by the same weights, to be shared.
    """

    def __init__(
        self,
        model: BaseModel,
        job: Job,
        rows: list[Row],
        workspace: Workspace,
        adapters: RowAdapters | None = None,
    ) -> None:
        self.job = job
        self.rows = rows
        self._model = model
        self._workspace = workspace
        self._unentered = deque(rows)
        self.adapters = adapters
        if adapters is None and job.weights.adapter is not None:
            self.adapters = RowAdapters(model, [job.weights])
            self.adapters.place([job.weights] * TILE)

    @property
    def live(self) -> list[Row]:
        """Rows that go on."""
        return [row for row in self.rows if row.place is not None]

    def step(self) -> list[tuple[Row, Drawn]]:
        """Computes the next prompt of its rows or, once all are, the next token of each."""
        return self._enter() if self._unentered else self._decode()

    def _enter(self) -> list[tuple[Row, Drawn]]:
        first = self._unentered.popleft()
        prefix = first.prefix
        if first.place is None:
            raise RuntimeError("a row of a tile has no place")
        document = Document(
            prefix.tokens, first.place, self.job.weights, self.job.params.prompt_logprobs
        )
        (found,) = prefill(self._model, [document])
        prefix.hidden, prefix.logprobs = found.hidden, found.logprobs
        entered = [first]
        while self._unentered and self._unentered[0].prefix is prefix:
            row = self._unentered.popleft()
            if row.place is not None:
                row.place.pool.copy(first.place, row.place, len(prefix.tokens))
            entered.append(row)
        return [(row, self._draw(row, found.hidden[None])) for row in entered]

    def _decode(self) -> list[tuple[Row, Drawn]]:
        padding = [None] * (TILE - len(self.rows))
        places = [*(row.place for row in self.rows), *padding]
        tokens = [0 if row.place is None else row.tokens[-1] for row in self.rows]
        tokens += [0] * len(padding)
        hidden = decode(self._model, tokens, places, self.adapters, alone=True)
        logits = logits_of(self._model, hidden, self._workspace)
        return [
            (row, draw(logits[index : index + 1], [row.params], [row.point], self._workspace))
            for index, row in enumerate(self.rows)
            if row.place is not None
        ]

    def _draw(self, row: Row, hidden: torch.Tensor) -> Drawn:
        logits = logits_of(self._model, hidden, self._workspace)
        return draw(logits, [row.params], [row.point], self._workspace)


def first_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows of the next tile."""
    return [row for row, _ in zip(rows, range(TILE), strict=False)]
