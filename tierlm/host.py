"""Host memory available to this process."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import psutil

from tierlm.cgroups import cgroups
from tierlm.errors import TierlmError


def process_ram() -> int:
    """Resident set of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_ram() -> int:
    """Peak resident set of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_ram() -> int:
    """Bytes of host memory: the machine's, or the smallest limit of this process's memory cgroups."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroups())])


def available_ram() -> int:
    """Bytes that this process can still allocate: the machine's, or less in a memory cgroup."""
    free = int(psutil.virtual_memory().available)
    return min([free, *(max(0, limit - used) for limit, used in _cgroups())])


def cannot_start(count: int, what: str) -> TierlmError:
    """The error for ``count`` threads of ``what`` that the system refuses."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else soft
    return TierlmError(
        f"{what}: the system refuses {count} more thread{'s' * (count > 1)}. What limits them: this user's processes "
        f"and threads ({limit}; ulimit -u), those of the cgroup (pids.max; docker run --pids-limit), and address space "
        "(ulimit -v). Raise the limit, or use fewer threads: transfer_threads=, threads="
    )


def require_threads(count: int, what: str) -> None:
    """Raises TierlmError unless ``count`` more threads can live at once. For libraries that end the process if not."""
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(count)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise cannot_start(count, what) from error
    finally:
        done.set()
        for thread in started:
            thread.join()


def _cgroups() -> list[tuple[int, int]]:
    """(limit, use without reclaimable file pages) of this process's memory cgroup and its parents, v1 and v2."""
    found = []
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache"),
        2: ("memory.max", "memory.current", "file"),
    }
    for version, folder in cgroups("memory"):
        most, now, cache = names[version]
        limit, used = _number(folder / most), _number(folder / now)
        if limit is not None and used is not None and limit < 2**60:
            found.append((limit, used - _stat(folder / "memory.stat", cache)))
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _stat(file: Path, name: str) -> int:
    try:
        rows = dict(line.split() for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get(name, 0))
