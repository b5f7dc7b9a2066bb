"""Files that are written whole or not at all, and where a user's own are kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` beside ``file``, bring it to the disk, and rename: a reader finds the old or the new. OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(beside, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def user_cache() -> Path | None:
    """tierlm's folder in the user's cache folder; None where the user has none."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the specification says to ignore any other
        return Path(chosen) / "tierlm"
    try:
        return Path.home() / ".cache" / "tierlm"
    except RuntimeError:
        return None
