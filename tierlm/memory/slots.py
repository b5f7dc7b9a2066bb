"""Slots: parts of a slab of device memory, each with room for one record."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from tierlm.checkpoints.reader import host_memory
from tierlm.checkpoints.record import Place, Record
from tierlm.checkpoints.views import Weights, misaligned, weights_of
from tierlm.memory.interleave import interleave
from tierlm.memory.ticket import Ticket
from tierlm.policies import residency
from tierlm.processors import nodes


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """A slab: uint8 [nbytes], page-aligned. Host memory is pinned if there is an accelerator; otherwise its pages are
    committed when first written, on all NUMA nodes by turns."""
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    if torch.accelerator.is_available():
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    slab = torch.frombuffer(host_memory(max(nbytes, 1)), dtype=torch.uint8)[:nbytes]
    interleave(slab.data_ptr(), nbytes, nodes())
    return slab


def can_decommit() -> bool:
    """Whether host memory of ``allocate`` can be returned to the system: pinned memory cannot."""
    return hasattr(mmap, "MADV_DONTNEED") and not torch.accelerator.is_available()


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one record. ``guard``: the event that ends the last read of the old content. ``filled``: its pages are
    committed, or will be: it was written to, or is populated. ``stream``: runs copies into the slot beside computation;
    None on the host."""

    buffer: Tensor  # uint8 [size]
    guard: torch.Event | None = None
    filled: bool = False
    stream: torch.Stream | None = None
    size: int = field(init=False)
    memory: memoryview | None = field(init=False, default=None)  # on the host: the same bytes, to read files into
    _queued: bool = field(init=False)  # computation on it is asynchronous
    _views: tuple[Mapping[str, Place], Record | None, Weights] | None = None

    def __post_init__(self) -> None:
        self.size, self._queued = self.buffer.numel(), self.buffer.device.type != "cpu"
        if not self._queued:
            self.memory = self.buffer.numpy().data

    def weights(self, record: Record, exact: bool) -> Weights:
        """The weights of ``record``, which this slot holds. Views are cached; records of equal layout share them."""
        if self._views is not None:
            places, copied, found = self._views
            if places is record.places and (copied is None or copied is record):
                return found
        found = weights_of(self.buffer, record, exact)
        copied = record if misaligned(self.buffer, record) else None  # misaligned tensors are copies, not views
        self._views = record.places, copied, found
        return found

    def release(self) -> None:
        """Let the slot be overwritten only after the computation queued so far."""
        if self._queued:
            self.guard = torch.Event(self.buffer.device)
            self.guard.record()

    def decommit(self) -> int:
        """Return the memory of this empty slot to the system, until the next write. Returns the bytes freed: whole
        pages only."""
        if not self.filled:
            return 0
        self.filled = False
        first = -(-self.buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self.buffer.data_ptr() + self.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first or _libc().madvise(first, last - first, mmap.MADV_DONTNEED):
            return 0
        return last - first

    def copy(self, other: Slot, nbytes: int) -> None:
        """Copy the first ``nbytes`` of ``other`` and wait for the copy. For transfer threads."""
        target, source = self.buffer[:nbytes], other.buffer[:nbytes]
        if self.stream is None:
            target.copy_(source)
            return
        torch.accelerator.set_stream(self.stream)  # for this thread only
        target.copy_(source, non_blocking=True)
        self.stream.synchronize()

    def wait(self) -> None:
        """Wait until the old content is no longer read. For transfer threads."""
        if self.guard is not None:
            self.guard.synchronize()
            self.guard = None


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


@dataclass(slots=True, eq=False, kw_only=True)
class Entry(residency.Entry):
    """A record in ``slot``, in flight while ``ticket`` is set. ``source``: the entry below that it is copied from."""

    slot: Slot
    ticket: Ticket | None
    source: Entry | None = None
    error: BaseException | None = None
