"""What is wrong with a machine for a model's files, and what to do. Nothing here changes anything. No torch."""

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
HANDLES = 64  # of files that the engine and Python have open besides the model's
KERNELS = Path(__file__).parent.parent / "kernels"


@dataclass(frozen=True)
class Finding:
    """``level``: "ok", "note" (works, less well than it could), or "broken". ``what``, and what to do."""

    level: str
    area: str
    what: str
    todo: str = ""


def check_files(files: Sequence[Path]) -> list[Finding]:
    """The disk under a model's files."""
    unreadable = [file for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        return [Finding("broken", "files", f"{unreadable[0]} may not be read{more}", "change its owner or its mode")]
    largest = max(files, key=lambda file: file.stat().st_size)
    kind = file_system(largest)
    found = []
    if kind in MEMORY_FILE_SYSTEMS:
        found.append(Finding("note", "file system", f"{kind}: the model's files take up memory", "keep them on a disk"))
    elif kind in REMOTE or kind.startswith("fuse"):
        found.append(Finding("note", "file system", f"{kind} is remote or slow", "copy the model to a local disk"))
    else:
        found.append(Finding("ok", "file system", kind or "not told by this system"))
    reader, why = open_reader("auto", list(files))
    reader.close()
    if reader.name == "direct":
        found.append(Finding("ok", "O_DIRECT", "the files are read past the page cache"))
    else:
        todo = "move the model to ext4, xfs or btrfs on a local disk"
        found.append(Finding("note", "O_DIRECT", f"{why}: memory-mapped reads are several times slower", todo))
    usage = shutil.disk_usage(largest.parent)
    if usage.free < 0.02 * usage.total:
        what = f"{format_size(usage.free)} of {format_size(usage.total)} are free"
        found.append(Finding("note", "space", what, "a disk that is nearly full is slow: make room"))
    else:
        found.append(Finding("ok", "space", f"{format_size(usage.free)} free"))
    return found


def check_limits(files: int, pins: bool) -> list[Finding]:
    """What this process may use. ``files``: how many the model has; ``pins``: whether memory is locked for a card."""
    found = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files + HANDLES:
        todo = f"ulimit -n {files + HANDLES}" + (
            "" if hard >= files + HANDLES else ", as root: the hard limit is lower"
        )
        found.append(Finding("broken", "open files", f"{soft} are allowed, the model has {files}", todo))
    else:
        found.append(Finding("ok", "open files", f"{soft} allowed"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if pins and locked != resource.RLIM_INFINITY and locked < available_ram() // 2:
        what = f"{format_size(locked)} may be locked: memory for copies to the card cannot all be pinned"
        found.append(Finding("note", "memlock", what, "ulimit -l unlimited, or memlock in /etc/security/limits.conf"))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        what = f"address space is limited to {format_size(space)}"
        found.append(Finding("note", "address space", what, "ulimit -v unlimited; a budget does what it is for"))
    machine, ours = int(psutil.virtual_memory().total), total_ram()
    if ours < machine:
        what = f"a memory cgroup allows {format_size(ours)} of {format_size(machine)}"
        found.append(Finding("ok", "cgroup", f"{what}; --ram auto keeps within it"))
    else:
        found.append(Finding("ok", "memory", f"{format_size(available_ram())} of {format_size(machine)} free"))
    swap = psutil.swap_memory()
    if swap.used > 2**28:
        what = f"{format_size(swap.used)} are swapped out: this machine has been short of memory"
        found.append(Finding("note", "swap", what, "lower the budget, or end what else takes memory"))
    return found


def check_machine(folder: Path = Path("/sys")) -> list[Finding]:
    """Processors, huge pages, kernels, cache folder. ``folder``: where the system tells, /sys."""
    found = []
    governors = {file.read_text().strip() for file in folder.glob("devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    if "powersave" in governors and not (folder / "devices/system/cpu/intel_pstate").exists():
        todo = "cpupower frequency-set -g performance"
        found.append(Finding("note", "governor", "processors are held at their lowest frequency (powersave)", todo))
    elif governors:
        found.append(Finding("ok", "governor", ", ".join(sorted(governors))))
    pages = folder / "kernel/mm/transparent_hugepage/enabled"
    if pages.exists() and "[never]" in pages.read_text():
        todo = f"as root: echo madvise > {pages}"
        what = "transparent huge pages are off: a direct read into small pages has reached a third of the speed"
        found.append(Finding("note", "huge pages", what, todo))
    found.append(_kernels())
    cache = user_cache()
    above = None if cache is None else next(part for part in (cache, *cache.parents) if os.access(part, os.F_OK))
    if above is None or not os.access(above, os.W_OK):
        todo = "name one that can be written to with XDG_CACHE_HOME"
        found.append(Finding("note", "cache folder", "measurements and heat cannot be remembered", todo))
    return found


def _kernels() -> Finding:
    if (file := find_library(KERNELS)) is not None:
        try:
            ctypes.CDLL(str(file))
        except OSError as error:
            return Finding("broken", "kernels", f"{file.name} does not load: {error}", "install tierlm again here")
        return Finding("ok", "kernels", f"compiled ({file.name})")
    todo = "install a C++ compiler, then tierlm again"
    return Finding("note", "kernels", "not compiled: torch does their work, several times slower", todo)
