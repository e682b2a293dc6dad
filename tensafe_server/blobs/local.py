"""Blobs as files below one directory."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from tensafe_server.blobs.base import KEY_PATTERN, BlobNotFoundError
from tensafe_server.storage_faults import disk_writes

_KEY = re.compile(KEY_PATTERN)


class LocalBlobStore:
    """Files written beside their place, synced, and renamed into it: a crash leaves the old blob
    or the new one, never a part of one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with disk_writes():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def writer(self, key: str) -> LocalBlobWriter:
        return LocalBlobWriter(self._path(key))

    def put(self, key: str, data: bytes) -> None:
        writer = self.writer(key)
        try:
            writer.write(data)
            writer.commit()
        finally:
            writer.abort()

    def get(self, key: str) -> bytes:
        with self._open(key) as file:
            return file.read()

    def read(self, key: str, offset: int, chunk_bytes: int) -> Iterator[bytes]:
        with self._open(key) as file:
            file.seek(offset)
            while chunk := file.read(chunk_bytes):
                yield chunk

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        path = self._path(key)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the last file of a snapshot or an artifact takes its directory
            path.parent.rmdir()

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        for path in self._files(self._root / prefix):
            if not path.name.startswith("."):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    yield path.relative_to(self._root).as_posix(), path.stat().st_size

    def sweep_partial(self) -> int:
        partial = [path for path in self._files(self._root) if path.name.startswith(".")]
        for path in partial:
            path.unlink(missing_ok=True)
        return len(partial)

    def _files(self, root: Path) -> Iterator[Path]:
        for directory, _, names in os.walk(root):
            for name in names:
                yield Path(directory, name)

    def _open(self, key: str) -> IO[bytes]:
        try:
            return open(os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except FileNotFoundError:
            raise BlobNotFoundError(key) from None

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a blob key: {key!r}")
        return self._root / key


class LocalBlobWriter:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with disk_writes():
            self._file = self._open()

    def _open(self) -> IO[bytes]:
        while True:  # a deletion may take an empty directory away between the two
            _make_private(self._path.parent)
            with suppress(FileNotFoundError):
                # Unbuffered: what a full disk did not take must not be tried again by `close`.
                return open(self._partial, "xb", buffering=0, opener=_for_the_owner)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with disk_writes():
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self) -> None:
        with disk_writes():
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def abort(self) -> None:
        if not self._file.closed:
            self._file.close()
        with suppress(FileNotFoundError):
            self._partial.unlink()


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _make_private(directory: Path) -> None:
    """Makes a directory and those above it, each for the owner only."""
    if not directory.is_dir():
        _make_private(directory.parent)
        directory.mkdir(exist_ok=True, mode=0o700)
