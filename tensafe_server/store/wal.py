"""What a crash, or damage, has left at the end of SQLite's write-ahead log.

SQLite itself keeps the committed transactions up to the first frame that is not intact, and drops
the rest without a word. This module only counts what it dropped, so that the start can say it.
Format: https://www.sqlite.org/fileformat2.html#walformat
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct(">8I")
_FRAME_HEADER = struct.Struct(">6I")
_MAGIC = 0x377F0682  # and | 1, for big-endian checksums


@dataclass(frozen=True, slots=True)
class WalFile:
    """A log as it lies on the disk.

    Attributes:
        size_bytes: of the whole file; 0 if there is none.
        frame_bytes: a frame's header and page; 0 if the file's header is damaged.
        frames: frames that carry the header's salts, intact or not; those behind them are what an
            earlier use of the file has left.
        fragment_bytes: length of an unfinished frame at the file's end.
    """

    size_bytes: int
    frame_bytes: int = 0
    frames: int = 0
    fragment_bytes: int = 0

    @property
    def unreadable(self) -> bool:
        """Whether SQLite would drop the whole file, committed transactions and all."""
        return self.size_bytes > _HEADER.size and not self.frame_bytes

    def lost(self, kept_frames: int) -> str:
        """What SQLite dropped if it has kept so many frames, as a sentence; empty if nothing."""
        dropped = max(0, self.frames - kept_frames) * self.frame_bytes + self.fragment_bytes
        if not dropped:
            return ""
        return (
            f"the write-ahead log ended in {dropped} bytes that are no committed transaction (a "
            f"crash while writing, or damage): they were dropped; the {kept_frames} frames of "
            "committed transactions before them are there"
        )


def read_wal(path: Path) -> WalFile:
    """Reads a log before SQLite opens it."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header = file.read(_HEADER.size)
            if not _intact(header):
                return WalFile(size)
            _, _, page_bytes, _, *salts, _, _ = _HEADER.unpack(header)
            frame_bytes = _FRAME_HEADER.size + page_bytes
            whole, fragment = divmod(size - _HEADER.size, frame_bytes)
            frames = 0
            for number in range(whole):
                file.seek(_HEADER.size + number * frame_bytes)
                _, _, *found, _, _ = _FRAME_HEADER.unpack(file.read(_FRAME_HEADER.size))
                if found == salts:
                    frames = number + 1
            return WalFile(size, frame_bytes, frames, fragment)
    except FileNotFoundError:
        return WalFile(0)


def _intact(header: bytes) -> bool:
    if len(header) < _HEADER.size:
        return False
    magic = int.from_bytes(header[:4], "big")
    if magic & ~1 != _MAGIC:
        return False
    words = struct.unpack(">6I" if magic & 1 else "<6I", header[:24])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return struct.pack(">2I", first, second) == header[24:]
