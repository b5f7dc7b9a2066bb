"""Checks of a machine for a model's files, with advice. Read-only. No torch."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tierlm.checkpoints.reader import open_reader
from tierlm.config import format_size
from tierlm.files import user_cache
from tierlm.host import available_ram, total_ram
from tierlm.library import find_library
from tierlm.profiling.storage import MEMORY_FILE_SYSTEMS, file_system

REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "glusterfs", "sshfs", "fuse.sshfs")
HANDLES = 64  # open files of the engine and Python, besides the model's
KERNELS = Path(__file__).parent.parent / "kernels"


@dataclass(frozen=True)
class Finding:
    """One result. ``level``: "ok", "note" (works, could be better) or "broken"; ``todo``: what to do about it."""

    level: str
    area: str
    what: str
    todo: str = ""


def check_files(files: Sequence[Path]) -> list[Finding]:
    """Check the disk under a model's files."""
    unreadable = [file for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        return [Finding("broken", "files", f"{unreadable[0]} is not readable{more}", "change its owner or its mode")]
    largest = max(files, key=lambda file: file.stat().st_size)
    kind = file_system(largest)
    found = []
    if kind in MEMORY_FILE_SYSTEMS:
        found.append(Finding("note", "file system", f"{kind}: the model's files occupy memory", "keep them on a disk"))
    elif kind in REMOTE or kind.startswith("fuse"):
        found.append(Finding("note", "file system", f"{kind} is remote or slow", "copy the model to a local disk"))
    else:
        found.append(Finding("ok", "file system", kind or "unknown"))
    reader, why = open_reader("auto", list(files))
    reader.close()
    if reader.name == "direct":
        found.append(Finding("ok", "O_DIRECT", "reads bypass the page cache"))
    else:
        todo = "move the model to ext4, xfs or btrfs on a local disk"
        found.append(Finding("note", "O_DIRECT", f"{why}: reads through the page cache are slower", todo))
    usage = shutil.disk_usage(largest.parent)
    if usage.free < 0.02 * usage.total:
        what = f"{format_size(usage.free)} of {format_size(usage.total)} free"
        found.append(Finding("note", "space", what, "free some space: a nearly full disk is slow"))
    else:
        found.append(Finding("ok", "space", f"{format_size(usage.free)} free"))
    return found


def check_limits(files: int, pins: bool) -> list[Finding]:
    """Check the limits of this process. ``files``: number of files; ``pins``: whether a card needs locked memory."""
    found = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files + HANDLES:
        todo = f"ulimit -n {files + HANDLES}" + (
            "" if hard >= files + HANDLES else ", as root: the hard limit is lower"
        )
        found.append(Finding("broken", "open files", f"{soft} allowed, the model has {files}", todo))
    else:
        found.append(Finding("ok", "open files", f"{soft} allowed"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if pins and locked != resource.RLIM_INFINITY and locked < available_ram() // 2:
        what = f"the limit is {format_size(locked)}: not all memory for copies to the card can be pinned"
        found.append(Finding("note", "memlock", what, "ulimit -l unlimited, or memlock in /etc/security/limits.conf"))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        what = f"address space is limited to {format_size(space)}"
        found.append(Finding("note", "address space", what, "ulimit -v unlimited; the budget limits memory instead"))
    machine, ours = int(psutil.virtual_memory().total), total_ram()
    if ours < machine:
        what = f"a memory cgroup allows {format_size(ours)} of {format_size(machine)}"
        found.append(Finding("ok", "cgroup", f"{what}; --ram auto respects it"))
    else:
        found.append(Finding("ok", "memory", f"{format_size(available_ram())} of {format_size(machine)} free"))
    swap = psutil.swap_memory()
    if swap.used > 2**28:
        what = f"{format_size(swap.used)} swapped out: this machine has been short of memory"
        found.append(Finding("note", "swap", what, "lower the budget, or stop other programs"))
    return found


def check_machine(folder: Path = Path("/sys")) -> list[Finding]:
    """Check processors, huge pages, kernels and the cache folder. ``folder``: sysfs."""
    found = []
    governors = {file.read_text().strip() for file in folder.glob("devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    if "powersave" in governors and not (folder / "devices/system/cpu/intel_pstate").exists():
        todo = "cpupower frequency-set -g performance"
        found.append(Finding("note", "governor", "processors run at their lowest frequency (powersave)", todo))
    elif governors:
        found.append(Finding("ok", "governor", ", ".join(sorted(governors))))
    pages = folder / "kernel/mm/transparent_hugepage/enabled"
    if pages.exists() and "[never]" in pages.read_text():
        todo = f"as root: echo madvise > {pages}"
        what = "transparent huge pages are off: direct reads into small pages can be three times slower"
        found.append(Finding("note", "huge pages", what, todo))
    found.append(_kernels())
    cache = user_cache()
    above = None if cache is None else next(part for part in (cache, *cache.parents) if os.access(part, os.F_OK))
    if above is None or not os.access(above, os.W_OK):
        todo = "set XDG_CACHE_HOME to a writable folder"
        found.append(Finding("note", "cache folder", "measurements and heat cannot be remembered", todo))
    return found


def _kernels() -> Finding:
    if (file := find_library(KERNELS)) is not None:
        try:
            ctypes.CDLL(str(file))
        except OSError as error:
            return Finding("broken", "kernels", f"{file.name} does not load: {error}", "reinstall tierlm here")
        return Finding("ok", "kernels", f"compiled ({file.name})")
    todo = "install a C++ compiler, then reinstall tierlm"
    return Finding("note", "kernels", "not compiled: torch is used instead, several times slower", todo)
