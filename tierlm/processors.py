"""The processors of this process: how many threads compute, and which processors a NUMA node has."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tierlm.cgroups import cgroups

SLOW = 0.75  # of the fastest core's speed; slower cores are efficiency cores


def compute_threads(system: Path = Path("/"), allowed: Collection[int] | None = None) -> int:
    """Threads that compute by default: one for each core, without efficiency cores, and no more than the cpu quota of
    containers pays for. ``allowed``: the processors this process may use; None: its affinity.

    The two processors of a core share its arithmetic, and one of them reaches the memory bandwidth. Layers end with
    their slowest part, which an efficiency core would compute. Beyond a quota the system stops all threads together.
    """
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    folder = system / "sys/devices/system/cpu"
    fast = _fast(system, folder, allowed)
    cores = {min(_siblings(folder, cpu) & fast, default=cpu) for cpu in fast}
    return max(1, min(len(cores), _quota(system)))


def numbers(text: str) -> set[int]:
    """A list of processors as the system writes it: "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def nodes(system: Path = Path("/"), allowed: Collection[int] | None = None) -> dict[int, list[int]]:
    """The processors this process may use, by NUMA node; all on node 0 if the system does not say."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    found = {}
    for node in (system / "sys/devices/system/node").glob("node[0-9]*"):
        cpus = sorted(_numbers_of(node / "cpulist") & set(allowed))
        if cpus:
            found[int(node.name[4:])] = cpus
    return dict(sorted(found.items())) or {0: sorted(allowed)}


def _fast(system: Path, folder: Path, allowed: Collection[int]) -> set[int]:
    """The processors of performance cores, by Intel's list, Arm's capacities, or frequencies."""
    listed = _numbers_of(system / "sys/devices/cpu_core/cpus") & set(allowed)
    if listed:
        return listed
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = {cpu: _number(folder / f"cpu{cpu}" / name) for cpu in allowed}
        known = {cpu: speed for cpu, speed in speeds.items() if speed is not None}
        if len(known) == len(speeds):
            return {cpu for cpu, speed in known.items() if speed >= SLOW * max(known.values())}
    return set(allowed)


def _siblings(folder: Path, cpu: int) -> set[int]:
    """The processors of the core that ``cpu`` belongs to."""
    return _numbers_of(folder / f"cpu{cpu}/topology/thread_siblings_list") or {cpu}


def _quota(system: Path) -> int:
    """Whole processors that the cpu quotas of all cgroups allow."""
    shares = [float("inf")]
    for version, folder in cgroups("cpu", system):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:
                shares.append(float(quota) / float(period))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return int(min(*shares, 2**20))


def _numbers_of(file: Path) -> set[int]:
    try:
        return numbers(file.read_text())
    except (OSError, ValueError):
        return set()


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
