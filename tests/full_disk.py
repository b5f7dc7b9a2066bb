"""A disk that is full."""

from __future__ import annotations

import builtins
import errno
from typing import Any


class FullDisk:
    """FAKE: an ``open`` whose disk is full after some bytes."""

    def __init__(self, room: int):
        self.room = room

    def open(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        stream = builtins.open(file, mode, *rest, **options)  # noqa: SIM115
        return stream if "w" not in mode else FullStream(stream, self)


class FullStream:
    def __init__(self, stream: Any, disk: FullDisk):
        self._stream, self._disk = stream, disk

    def write(self, data: Any) -> int:
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._stream.write(data))

    def __enter__(self) -> FullStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
