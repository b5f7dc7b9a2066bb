"""The control groups of this process, where containers and services are limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroups(controller: str, system: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """The version, 1 or 2, and the folder of this process's cgroup for ``controller`` ("cpu", "memory"), then of its
    parents. ``system``: where proc and sys are."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, root = 2, system / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, root = 1, system / "sys/fs/cgroup" / controller
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            yield version, folder
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
