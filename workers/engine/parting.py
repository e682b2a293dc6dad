"""Parts a pass into several of like size, which may be computed at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.batches import ScoredBatch
from workers.engine.passes import Member, Pass, Share, lay_out

_PIECES = 4
"""How many calls a part has room for at least if they are not parted: a call in two parts has the
products of its adapter twice."""
_LOPSIDED = 1.15
"""How much more than its share the largest part may hold: as long as one thread is still at work on
it when the others have ended, all threads would have been faster together."""

_Piece = list[Member]


def parted(batches: Sequence[ScoredBatch], work: Pass, most: int) -> list[Pass]:
    """As many parts as can be of like size; the pass itself if there are none.

    It depends on the pass alone. Rows keep their order, and rows together stay so.

    Args:
        batches: of all calls.
        most: parts.
    """
    for count in range(most, 1, -1):
        parts = _deal(_pieces(batches, work, count), batches, count)
        sizes = [sum(_tokens(batches, piece) for piece in part) for part in parts]
        if all(parts) and count * max(sizes) <= _LOPSIDED * sum(sizes):
            order = {member: at for at, member in enumerate(_members(work.shares))}
            own = ([member for piece in part for member in piece] for part in parts)
            return [lay_out(batches, sorted(part, key=order.__getitem__)) for part in own]
    return [work]


def _deal(
    pieces: Sequence[_Piece], batches: Sequence[ScoredBatch], count: int
) -> list[list[_Piece]]:
    """The longest first, each to the part that has least."""
    parts: list[list[_Piece]] = [[] for _ in range(count)]
    sizes = [0] * count
    for piece in sorted(pieces, key=lambda piece: -_tokens(batches, piece)):
        least = sizes.index(min(sizes))
        parts[least].append(piece)
        sizes[least] += _tokens(batches, piece)
    return parts


def _pieces(batches: Sequence[ScoredBatch], work: Pass, count: int) -> list[_Piece]:
    """What stays together: small calls, and of others rows together."""
    pieces: list[_Piece] = []
    for share in work.shares:
        members = _members([share])
        if _PIECES * count * _tokens(batches, members) <= len(work.ids):
            pieces.append(members)
        else:
            together = batches[share.call].together
            pieces += [members[at : at + together] for at in range(0, len(members), together)]
    return pieces


def _members(shares: Sequence[Share]) -> list[Member]:
    return [(share.call, row) for share in shares for row in share.rows]


def _tokens(batches: Sequence[ScoredBatch], members: Sequence[Member]) -> int:
    return sum(int(batches[call].ends[row]) for call, row in members)
