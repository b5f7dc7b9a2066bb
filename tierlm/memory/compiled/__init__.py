"""Reads that begin and end outside of Python: their threads never wait for the interpreter, nor it for them."""

from __future__ import annotations

import ctypes
import importlib.machinery
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TIMED = 1024  # reads of a ticket whose times can be told
LEAVE = 1.0  # seconds that reads under way get when Python ends


@dataclass(frozen=True, slots=True)
class Account:
    """``waiting``: bytes of demands that no thread has taken up; ``seconds``: during which at least one read was under
    way; ``cpu``: processor time of the threads."""

    bytes: int
    waiting: int
    seconds: float
    cpu: float


class Reads:
    """A queue of reads, and threads that do them: demands first, ``spare`` threads at most for all else.

    Reads that adjoin in a file, up to ``merged_bytes`` in all, may be done in one go. ``announce`` is called, by some
    thread, when a ticket has ended that is to be announced. Tickets are numbers. All methods may be called from any
    thread; but for ``wait`` and ``close`` they keep the interpreter, since they are done at once.
    """

    def __init__(self, threads: int, spare: int, merged_bytes: int, announce: Callable[[], None]):
        libraries = load()
        assert libraries is not None  # the caller has asked
        self._quick, self._slow = libraries
        self._count = ctypes.c_int64()  # tickets that have ended, and calls of ``wake``
        self._announce = ctypes.CFUNCTYPE(None)(announce)
        self._times = (ctypes.c_double * (3 * TIMED))()
        count = ctypes.byref(self._count)
        self._reads = self._quick.tierlm_reads_open(threads, spare, merged_bytes, count, self._announce)
        weakref.finalize(self, self._slow.tierlm_reads_free, self._reads, LEAVE)

    @property
    def count(self) -> int:
        """How much has ended so far."""
        return self._count.value

    def submit(self, requests: array[int], base: int, priority: int, announced: bool) -> int:
        """Queue reads to the address ``base``. ``requests``: of each five words, the file descriptor, the offset in the
        file, the bytes that have to come, those that may, and their place behind ``base``; the last three aligned but
        for the bytes that have to come."""
        address, words = requests.buffer_info()
        number: int = self._quick.tierlm_reads_submit(self._reads, priority, address, words // 5, base, announced)
        return number

    def promote(self, ticket: int) -> None:
        """Make a ticket a demand."""
        self._quick.tierlm_reads_promote(self._reads, ticket)

    def cancel(self, ticket: int) -> bool:
        """Drop a ticket of which nothing has begun. False if it is too late for that."""
        return bool(self._quick.tierlm_reads_cancel(self._reads, ticket))

    def announce(self, ticket: int) -> None:
        """Announce the end of ``ticket``, unless it has come."""
        self._quick.tierlm_reads_announce(self._reads, ticket)

    def ended(self, timed: bool = False) -> Iterator[tuple[int, bool, Sequence[float]]]:
        """What has ended since the last call: ticket, whether all of it has come, and where ``timed`` begin, end and
        thread of its reads, one after the other."""
        while number := self._quick.tierlm_reads_next_ended(self._reads, self._times, TIMED if timed else 0):
            yield abs(number), number > 0, self._times[:] if timed else ()

    def unfinished(self, ticket: int) -> int:
        """The first read of ``ticket`` that is not through."""
        index: int = self._quick.tierlm_reads_unfinished(self._reads, ticket)
        return max(0, index)

    def wait(self, seen: int, timeout: float) -> None:
        """Return once ``count`` is not ``seen``, or after ``timeout`` seconds."""
        self._slow.tierlm_reads_wait(self._reads, seen, timeout)

    def wake(self) -> None:
        """Count one more thing that has ended: end all waits."""
        self._quick.tierlm_reads_wake(self._reads)

    def account(self) -> Account:
        """What has been read so far."""
        moved, spent = (ctypes.c_int64 * 2)(), (ctypes.c_double * 2)()
        self._quick.tierlm_reads_stats(self._reads, moved, spent)
        return Account(*moved, *spent)

    def close(self, timeout: float) -> bool:
        """Stop the threads after the reads that they are in; the rest is dropped. False if one of them is stuck. May be
        called again."""
        if self._slow.tierlm_reads_close(self._reads, timeout):
            return True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # whatever is read into must outlive the read
        return False


@cache
def load() -> tuple[ctypes.PyDLL, ctypes.CDLL] | None:
    """The library, called with the interpreter kept and with it free, or None where it was not built."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        file = Path(__file__).parent / f"_native{suffix}"
        if file.exists():
            quick, slow = ctypes.PyDLL(str(file)), ctypes.CDLL(str(file))
            pointer, number, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
            quick.tierlm_reads_open.argtypes = [whole, whole, number, pointer, pointer]
            quick.tierlm_reads_open.restype = pointer
            quick.tierlm_reads_submit.argtypes = [pointer, whole, pointer, number, pointer, whole]
            quick.tierlm_reads_submit.restype = number
            quick.tierlm_reads_next_ended.argtypes = [pointer, pointer, number]
            quick.tierlm_reads_next_ended.restype = number
            quick.tierlm_reads_stats.argtypes = [pointer] * 3
            quick.tierlm_reads_stats.restype = None
            for name in ("promote", "cancel", "announce", "unfinished"):
                getattr(quick, f"tierlm_reads_{name}").argtypes = [pointer, number]
            quick.tierlm_reads_unfinished.restype = number
            quick.tierlm_reads_wake.argtypes = [pointer]
            slow.tierlm_reads_wait.argtypes = [pointer, number, real]
            slow.tierlm_reads_close.argtypes = slow.tierlm_reads_free.argtypes = [pointer, real]
            return quick, slow
    return None
