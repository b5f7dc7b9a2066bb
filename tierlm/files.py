"""Atomic file writes, and the user's cache folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """A stream to a temporary file that is synced and renamed to ``file`` after the ``with`` block: a reader finds the
    old file or the new. An error leaves the old one. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(beside, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` to ``file`` atomically. Raises OSError."""
    with whole(file) as stream:
        stream.write(text.encode("utf-8"))


def user_cache() -> Path | None:
    """tierlm's folder in the user's cache folder; None if the user has no home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the XDG specification ignores relative paths
        return Path(chosen) / "tierlm"
    try:
        return Path.home() / ".cache" / "tierlm"
    except RuntimeError:
        return None
