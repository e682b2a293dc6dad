"""Decodes the operations on one model together.

Rows of all operations and tenants are one batch, each with its own adapter. A row that ends makes
room for the next that waits: of the operation with the fewest rows in the batch, so that none holds
up the others however many rows it has; who is next and does not fit yet is not overtaken. Rows of
deterministic runs are apart, in tiles.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tensafe.wire.status import TenSafeFault
from workers.engine.base_model import BaseModel
from workers.engine.memory import is_memory_error
from workers.engine.sampling.cache import KeyValueCache
from workers.engine.sampling.distribution import Drawn, Workspace, draw
from workers.engine.sampling.passes import Document, decode, logits_of, prefill
from workers.engine.sampling.row_adapters import RowAdapters
from workers.engine.sampling.rows import Job, Prefix, Row
from workers.engine.sampling.tiles import Tile, first_rows
from workers.engine.sampling.weights import ArtifactShelf, PinnedWeights
from workers.operations import SampleOutcome

log = logging.getLogger(__name__)

_MOST_TILES = 4
_LEAST_ROWS = 2
"""Rows of a pass: libraries have kernels of their own for the product of one, which round in other
places than those for a whole pass, so that one alone gets company that belongs to nobody."""


class Decoder:
    """The operations on one model, from their submission to their outcomes.

    Args:
        shelf: adapters of artifacts that are kept for a next time, as long as there is room.
        cache_bytes: most memory for keys, values and the adapters beside them.
        most_rows: of the batch; with more of them together a row costs no less.
        prompt_tokens: of prompts computed in one step, unless one alone has more; what bounds the
            time that all other rows wait for it.
    """

    def __init__(
        self,
        model: BaseModel,
        shelf: ArtifactShelf,
        *,
        cache_bytes: int,
        most_rows: int,
        prompt_tokens: int,
    ) -> None:
        self._model = model
        self._shelf = shelf
        self._cache: KeyValueCache[Row] = KeyValueCache(
            model.layer_shapes, model.dtype, model.device, cache_bytes
        )
        self._most_rows = most_rows
        self._prompt_tokens = prompt_tokens
        self._jobs: dict[str, Job] = {}
        self._tiles: deque[Tile] = deque()
        self._heirs: list[Row] = []
        self._adapters: RowAdapters | None = None
        self._workspace = Workspace()
        self._ended: list[tuple[Job, Exception | None]] = []

    @property
    def tokens(self) -> int:
        """Most tokens that are held at once."""
        return self._cache.tokens

    @property
    def busy(self) -> bool:
        """Whether there is something to do or to collect."""
        return bool(self._jobs or self._ended)

    def submit(self, job: Job) -> None:
        """Takes an operation in.

        Raises:
            TenSafeFault: OUT_OF_MEMORY: one of its rows would not fit if it were alone.
        """
        # Its weights may have to be copied while it waits.
        beside = job.weights.adapter_bytes + _stack_bytes(self._model, [job.weights])
        if not self._cache.fits(job.largest, beside):
            raise _too_large(f"a row of {job.largest} tokens and its adapter")
        self._jobs[job.operation_id] = job

    def collect(self) -> list[tuple[str, SampleOutcome | Exception]]:
        """What has ended since the last call."""
        ended, self._ended = self._ended, []
        return [(job.operation_id, error or job.outcome()) for job, error in ended]

    def cancel(self, operation_id: str) -> None:
        """Takes an operation out, which then has no outcome."""
        job = self._jobs.pop(operation_id, None)
        if job is not None:
            self._clear(job)
        self._ended = [each for each in self._ended if each[0].operation_id != operation_id]

    def step(self) -> None:
        """Lets rows in as far as there is room, adds a token to each row of the batch, and works
        for one tile."""
        entering = [*self._heirs, *self._admit()]
        self._heirs = []
        if entering:
            self._timed(entering, self._enter)
        rows = [row for row in self._rows() if row.tokens]  # heirs have none yet
        if rows:
            self._timed(rows, self._advance)
        if self._tiles:
            tile = self._tiles[0]
            self._tiles.rotate(-1)
            self._timed(tile.live, lambda _: self._advance_tile(tile))
            self._tiles = deque(tile for tile in self._tiles if tile.live)

    def _timed(self, rows: list[Row], work: Callable[[list[Row]], None]) -> None:
        begin = time.perf_counter()
        jobs = [row.job for row in rows]
        work(rows)
        share_ms = (time.perf_counter() - begin) * 1e3 / len(jobs)
        for job in jobs:
            job.compute_ms += share_ms

    def _rows(self) -> list[Row]:
        """The batch, pool by pool."""
        return [place.owner for pool in self._cache.pools.values() for place in pool.places]

    # Letting in.

    def _admit(self) -> list[Row]:
        entering: list[Row] = []
        fresh: set[Prefix] = set()
        tokens = 0
        live = len(self._rows())
        while (job := self._next_job(live)) is not None:
            if job.weights.deterministic:
                if not self._begin_tile(job):
                    break
                continue
            row = job.pending[0]
            if row.tokens or not (row.prefix in fresh or row.prefix.rows):
                tokens += len(row.context)
                if fresh and tokens > self._prompt_tokens:
                    break
                fresh.add(row.prefix)
            if not self._let_in([row]):
                break
            entering.append(row)
            live += 1
        return entering

    def _next_job(self, live: int) -> Job | None:
        waiting = [
            job
            for job in self._jobs.values()
            if job.pending
            and (
                len(self._tiles) < _MOST_TILES
                if job.weights.deterministic
                else live < self._most_rows
            )
        ]
        return min(waiting, key=lambda job: job.live, default=None)

    def _begin_tile(self, job: Job) -> bool:
        rows = first_rows(job.pending)
        if not self._let_in(rows, alone=True):
            return False
        others = [tile.adapters for tile in self._tiles if tile.job.weights is job.weights]
        adapters = others[0] if others else None
        self._tiles.appendleft(Tile(self._model, job, rows, self._workspace, adapters))
        return True

    def _let_in(self, rows: Sequence[Row], *, alone: bool = False) -> bool:
        """Takes places for rows of one operation, the next that wait of it; False, and none, if
        there is no room. If there never will be, the operation fails."""
        job = rows[0].job
        if self._take_places(rows, alone=alone) or (
            self._shelf.clear(self._model, self._weights()) and self._take_places(rows, alone=alone)
        ):
            for _ in rows:
                job.pending.popleft()
            job.live += len(rows)
            return True
        in_use = self._weights_in_use()
        self._cache.beside_bytes = self._beside_bytes(in_use)
        if not in_use:  # nothing will be freed, so it does not fit at all
            self._fail(job, _too_large(f"{len(rows)} rows" if alone else "a row"))
        return False

    def _take_places(self, rows: Sequence[Row], *, alone: bool) -> bool:
        """A place for each of these rows, or none."""
        self._cache.beside_bytes = self._beside_bytes(self._weights_in_use(), rows[0].job.weights)
        taken: list[Row] = []
        for row in rows:
            row.place = self._cache.take(row.capacity, row, alone=alone)
            if row.place is None:
                for one in taken:
                    self._release(one)
                return False
            taken.append(row)
        return True

    def _beside_bytes(self, in_use: Sequence[PinnedWeights], *more: PinnedWeights) -> int:
        """Memory of adapters beside the rows: as passes hold them, and what is kept for operations
        alone or for a next time. That of operations that wait does not count against the only one
        that runs, which would then wait for ever."""
        used = [*in_use, *more]
        every = self._weights()
        own = {one for one in (every if in_use else used) if one.owns_adapter}
        own.update(self._shelf.idle(self._model, every))
        return _stack_bytes(self._model, used) + sum(one.adapter_bytes for one in own)

    def _weights(self) -> set[PinnedWeights]:
        """Of all operations, those that wait too."""
        return {job.weights for job in self._jobs.values()}

    def _weights_in_use(self) -> list[PinnedWeights]:
        return list(dict.fromkeys(job.weights for job in self._jobs.values() if job.live))

    # Computing.

    def _enter(self, rows: list[Row]) -> None:
        """Computes the prompts of new rows, each once, and draws the rows' first tokens."""
        leaders: list[Row] = []
        for row in rows:
            started = any(leader.prefix is row.prefix for leader in leaders)
            if row.tokens or not (started or row.prefix.rows):
                leaders.append(row)
        try:
            hidden = self._prefill(leaders)
            for row in rows:
                if row not in hidden:
                    hidden[row] = self._share_prefix(row)
            self._take(rows, self._draw(rows, torch.stack([hidden[row] for row in rows])))
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            self._give_way(rows, leaders or rows)

    def _prefill(self, leaders: Sequence[Row]) -> dict[Row, Tensor]:
        """[D] of each row's last token."""
        documents = [
            Document(
                np.asarray(row.context, np.int32),
                row.place,
                row.job.weights,
                row.params.prompt_logprobs and not row.tokens,
            )
            for row in leaders
            if row.place is not None
        ]
        found = prefill(self._model, documents) if documents else []
        for row, own in zip(leaders, found, strict=True):
            if not row.tokens:
                row.prefix.hidden = own.hidden
                row.prefix.logprobs = own.logprobs
            row.prefix.rows.append(row)
        return {row: own.hidden for row, own in zip(leaders, found, strict=True)}

    def _share_prefix(self, row: Row) -> Tensor:
        """Copies a prompt's keys and values from a row that has them, unless it is the row's own
        place where they lie."""
        source, hidden = row.prefix.rows[0].place, row.prefix.hidden
        if source is None or row.place is None or hidden is None:
            raise RuntimeError("a prompt that was computed is not there")
        if row not in row.prefix.rows:
            row.place.pool.copy(source, row.place, len(row.prefix.tokens))
            row.prefix.rows.append(row)
        return hidden

    def _advance(self, rows: list[Row]) -> None:
        """Adds a token to each row."""
        company = max(0, _LEAST_ROWS - len(rows))
        try:
            hidden = decode(
                self._model,
                [row.tokens[-1] for row in rows] + [rows[0].tokens[-1]] * company,
                [row.place for row in rows] + [None] * company,
                self._adapters_of(rows, company),
            )[: len(rows)]
            drawn = self._draw(rows, hidden)
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            # Those that lose least begin again later, in a smaller batch.
            rows.sort(key=lambda row: -len(row.tokens))
            self._give_way(rows[len(rows) // 2 :], rows)
            return
        self._take(rows, drawn)

    def _advance_tile(self, tile: Tile) -> None:
        try:
            found = tile.step()
        except (MemoryError, RuntimeError) as error:
            if not is_memory_error(error):
                raise
            self._fail(
                tile.job,
                _too_large("a tile of rows, which is not split because the run is deterministic"),
            )
            return
        for row, drawn in found:
            self._take([row], drawn)

    def _draw(self, rows: Sequence[Row], hidden: Tensor) -> Drawn:
        logits = logits_of(self._model, hidden, self._workspace)
        return draw(
            logits, [row.params for row in rows], [row.point for row in rows], self._workspace
        )

    def _adapters_of(self, rows: Sequence[Row], company: int) -> RowAdapters | None:
        own = [row.job.weights for row in rows]
        weights = [one for one in dict.fromkeys(own) if one.adapter is not None]
        if not weights:
            self._adapters = None
        elif self._adapters is None or set(self._adapters.weights) != set(weights):
            self._adapters = RowAdapters(self._model, weights)
        if self._adapters is not None:
            self._adapters.place([*own, *[None] * company])
        return self._adapters

    # Ending.

    def _take(self, rows: Sequence[Row], drawn: Drawn) -> None:
        """Gives each row its token, tells of it, and lets go of those that have ended."""
        for index, row in enumerate(rows):
            if row.place is None:
                continue  # its operation has failed meanwhile
            if math.isnan(drawn.raw_logprobs[index]):
                self._fail(row.job, _not_finite())
                continue
            row.add(drawn, index)
            if row.job.on_chunk is not None and (chunk := row.chunk()) is not None:
                row.job.on_chunk(chunk)
            if row.finish_reason is not None and not self._inherited(row):
                self._release(row)
                row.job.live -= 1
                if row.job.ended:
                    self._end(row.job, None)

    def _inherited(self, row: Row) -> bool:
        """Leaves an ended row's place to the next row of the same prompt, if nobody else has that
        prompt's keys and values and no operation waits that has no row at all."""
        pending = row.job.pending
        if not pending or pending[0].prefix is not row.prefix or len(row.prefix.rows) > 1:
            return False
        if row.job.weights.deterministic or pending[0].tokens or row.place is None:
            return False
        if any(job.pending and not job.live for job in self._jobs.values()):
            return False
        heir = pending.popleft()
        heir.place, row.place = row.place, None
        heir.place.hand_over(heir, len(heir.prefix.tokens))
        heir.prefix.rows[:] = [heir]
        self._heirs.append(heir)
        return True

    def _give_way(self, rows: Sequence[Row], computed: Sequence[Row]) -> None:
        """The memory did not suffice for what was computed: these rows wait again, and less is
        computed together. What does not fit even by itself fails.

        Args:
            computed: the rows, or those of them whose prompts were.
        """
        for row in sorted(rows, key=lambda row: -row.order):
            if row.place is not None:
                self._release(row)
                row.job.live -= 1
                row.job.pending.appendleft(row)
        others = len(self._rows())
        if len(computed) > 1 and any(row.prefix.hidden is None for row in computed):
            self._prompt_tokens = sum(len(row.context) for row in computed) // 2
            log.warning("out of memory; prompts now take %d tokens a step", self._prompt_tokens)
        elif others or len(computed) > 1:
            self._most_rows = max(1, others, len(computed) // 2)
            log.warning("out of memory; a batch of samples now has %d rows", self._most_rows)
        else:
            row = computed[0]
            self._fail(row.job, _too_large(f"a row of {len(row.context)} tokens"))

    def _fail(self, job: Job, error: Exception) -> None:
        self._clear(job)
        self._end(job, error)

    def _end(self, job: Job, error: Exception | None) -> None:
        if self._jobs.pop(job.operation_id, None) is not None:
            self._ended.append((job, error))

    def _clear(self, job: Job) -> None:
        """Takes a job's rows out."""
        job.pending.clear()
        job.live = 0
        self._heirs = [row for row in self._heirs if row.job is not job]
        for row in job.rows:
            if row.place is not None:
                self._release(row)
        self._tiles = deque(tile for tile in self._tiles if tile.job is not job)

    def _release(self, row: Row) -> None:
        if row.place is not None:
            self._cache.release(row.place)
            row.place = None
        if row in row.prefix.rows:
            row.prefix.rows.remove(row)


def _stack_bytes(model: BaseModel, weights: Iterable[PinnedWeights]) -> int:
    """Memory of adapters as a pass holds them."""
    distinct = {one for one in weights if one.adapter is not None}
    numbers = sum(one.adapter.weights.numel() for one in distinct if one.adapter is not None)
    return numbers * model.faithful_adapter_dtype.itemsize


def _too_large(what: str) -> TenSafeFault:
    return TenSafeFault(
        "OUT_OF_MEMORY",
        f"the worker has too little memory for {what}; use a shorter prompt, a smaller max_tokens "
        "or rank, or a worker with more memory for samples (--sample-memory-mib)",
    )


def _not_finite() -> TenSafeFault:
    return TenSafeFault(
        "NON_FINITE_LOSS",
        "the model's logits are NaN or infinite; load an earlier state of the run",
    )
