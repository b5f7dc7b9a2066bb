"""The errors of tierlm.

::

    TierlmError                 (exit code 1)
    ├── UsageError              an invalid argument, on any machine (exit code 2); also a ValueError
    │   └── PromptError         a prompt that is empty, neither text nor ids, or longer than the context
    ├── BudgetError             the budget is below the floor; names both and the largest part
    ├── CheckpointError         a file of the model is missing, malformed, or contradicts another
    │   ├── UnsupportedModelError   a well-formed model whose architecture or format is not implemented
    │   └── ModelNotFoundError      no folder, file or known model of that name (exit code 2)
    ├── StorageError            a read failed, was short, stalled or did not match its checksum, or a write failed
    └── TraceError              a recorded trace is incomplete, malformed, or contradicts itself

A message says what was expected, what was found, where, and what to do.
"""

from __future__ import annotations

import traceback
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class TierlmError(Exception):
    """Base class of all errors of tierlm."""

    exit_code = 1


class UsageError(TierlmError, ValueError):
    """An invalid argument or option."""

    exit_code = 2


class PromptError(UsageError):
    """A prompt that is empty, neither text nor token ids, or does not fit the context."""


class BudgetError(TierlmError):
    """The budget is below the floor.

    Attributes: ``tier`` ("ram" or "vram"), ``floor`` and ``given`` in bytes, ``dominant`` (the floor's largest part).
    """

    def __init__(self, message: str, *, tier: str = "ram", floor: int = 0, given: int = 0, dominant: str = ""):
        super().__init__(message)
        self.tier, self.floor, self.given, self.dominant = tier, floor, given, dominant


class CheckpointError(TierlmError):
    """A checkpoint that is incomplete, malformed, or contradicts itself."""


class UnsupportedModelError(CheckpointError):
    """A well-formed model whose architecture or format is not implemented."""


class ModelNotFoundError(CheckpointError):
    """No model of that name: no folder, no file, and no Hub id."""

    exit_code = 2


class StorageError(TierlmError):
    """A failed read or write. Attributes: ``file``, ``tensor``, ``offset`` (bytes from the start of the file)."""

    def __init__(self, message: str, *, file: str = "", tensor: str = "", offset: int = 0):
        super().__init__(message)
        self.file, self.tensor, self.offset = file, tensor, offset


class TraceError(TierlmError):
    """A trace that is incomplete, malformed, or contradicts itself. Names the line or the offset."""


def forget_frames(error: E) -> E:
    """Drop the local variables that the tracebacks of ``error`` and its causes keep alive, such as a loaded model."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error
