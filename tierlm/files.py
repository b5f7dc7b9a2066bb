"""Files that are written whole or not at all, and where a user's own are kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """A stream to a file beside ``file``; at the end of the ``with`` block it is brought to the disk and renamed: a
    reader finds the old or the new. After an error the old one stays. OSError."""
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
    """Write ``text`` to ``file``, whole or not at all. OSError."""
    with whole(file) as stream:
        stream.write(text.encode("utf-8"))


def user_cache() -> Path | None:
    """tierlm's folder in the user's cache folder; None where the user has none."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the specification says to ignore any other
        return Path(chosen) / "tierlm"
    try:
        return Path.home() / ".cache" / "tierlm"
    except RuntimeError:
        return None
