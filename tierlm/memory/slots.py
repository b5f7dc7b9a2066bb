"""Slots: places in a slab of a device's memory that hold one record each."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from tierlm.checkpoints.checkpoint import Place, Record
from tierlm.checkpoints.reader import host_memory
from tierlm.checkpoints.views import Weights, misaligned, weights_of
from tierlm.memory.ticket import Ticket
from tierlm.policies import residency


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """A slab: uint8 [nbytes], page-aligned. In host memory it takes up room only as it is written to, and is pinned
    where there is an accelerator to copy to."""
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    if torch.accelerator.is_available():
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(host_memory(max(nbytes, 1)), dtype=torch.uint8)[:nbytes]


def can_give_back() -> bool:
    """Whether memory of ``allocate`` on the host can be returned to the system: pinned memory cannot."""
    return hasattr(mmap, "MADV_DONTNEED") and not torch.accelerator.is_available()


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one record. ``guard``: the event after which the last reader of the old content is through.
    ``filled``: something has been written to it, so that it takes up memory. ``stream``: what is copied into it runs
    on, apart from computation; None on a host."""

    buffer: Tensor  # uint8 [size]
    guard: torch.Event | None = None
    filled: bool = False
    stream: torch.Stream | None = None
    size: int = field(init=False)
    memory: memoryview | None = field(init=False, default=None)  # the same bytes, to read files into, on a host
    _queued: bool = field(init=False)  # computation on it may go on after the call
    _views: tuple[Mapping[str, Place], Record | None, Weights] | None = None

    def __post_init__(self) -> None:
        self.size, self._queued = self.buffer.numel(), self.buffer.device.type != "cpu"
        if not self._queued:
            self.memory = self.buffer.numpy().data

    def weights(self, record: Record, exact: bool) -> Weights:
        """The weights of ``record``, which is here: views, which serve all records that are laid out alike."""
        if self._views is not None:
            places, copied, found = self._views
            if places is record.places and (copied is None or copied is record):
                return found
        found = weights_of(self.buffer, record, exact)
        copied = record if misaligned(self.buffer, record) else None  # what its file misaligns is no view
        self._views = record.places, copied, found
        return found

    def release(self) -> None:
        """Note that computation on this slot has been queued: the slot may be overwritten only after it."""
        if self._queued:
            self.guard = torch.Event(self.buffer.device)
            self.guard.record()

    def give_back(self) -> int:
        """Return the memory of this slot, which holds nothing, to the system; the next write takes it again. Returns
        the bytes of the pages that are its own."""
        if not self.filled:
            return 0
        self.filled = False
        first = -(-self.buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (self.buffer.data_ptr() + self.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first or _libc().madvise(first, last - first, mmap.MADV_DONTNEED):
            return 0
        return last - first

    def copy(self, other: Slot, nbytes: int) -> None:
        """In a transfer thread: copy the first ``nbytes`` of ``other``, and wait for it."""
        target, source = self.buffer[:nbytes], other.buffer[:nbytes]
        if self.stream is None:
            target.copy_(source)
            return
        torch.accelerator.set_stream(self.stream)  # of this thread only
        target.copy_(source, non_blocking=True)
        self.stream.synchronize()

    def wait(self) -> None:
        """Wait, in a transfer thread, until nobody reads the old content any more."""
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
    """A record in ``slot``, on its way while ``ticket`` is set. ``source``: the entry below it is copied from."""

    slot: Slot
    ticket: Ticket | None
    source: Entry | None = None
    error: BaseException | None = None
