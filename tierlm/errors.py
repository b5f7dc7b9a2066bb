"""All errors that tierlm raises on purpose.

::

    TierlmError                 (exit code 1)
    ├── UsageError              a request that is wrong on any machine (exit code 2); also a ValueError
    │   └── PromptError         a prompt that is empty, or longer than the context
    ├── BudgetError             the model does not run in this budget: names the floor, the budget, what dominates
    ├── CheckpointError         a file of the model is missing, malformed, or contradicts another
    │   └── UnsupportedModelError   a well-formed model whose architecture or format is not implemented
    ├── StorageError            a read failed, returned short, stalled, or brought other bytes than were packed;
    │                           or a packed store could not be written
    └── TraceError              a recorded trace is incomplete, malformed, or contradicts itself

A message says what was expected, what was found, where, and what to do about it.
"""

from __future__ import annotations


class TierlmError(Exception):
    """Base class of all errors raised on purpose."""

    exit_code = 1


class UsageError(TierlmError, ValueError):
    """An argument or option without a valid meaning."""

    exit_code = 2


class PromptError(UsageError):
    """A prompt that is empty or does not fit the context."""


class BudgetError(TierlmError):
    """The budget is below what the model needs.

    Attributes: ``tier`` ("ram" or "vram"), ``floor`` and ``given`` in bytes, ``dominant``, the largest part of the
    floor in words.
    """

    def __init__(self, message: str, *, tier: str = "ram", floor: int = 0, given: int = 0, dominant: str = ""):
        super().__init__(message)
        self.tier, self.floor, self.given, self.dominant = tier, floor, given, dominant


class CheckpointError(TierlmError):
    """A checkpoint that is incomplete, malformed, or contradicts itself."""


class UnsupportedModelError(CheckpointError):
    """A well-formed model of a kind that is not implemented."""


class StorageError(TierlmError):
    """A read or a write that failed. Attributes: ``file``, ``tensor``, ``offset`` (bytes from the file's start)."""

    def __init__(self, message: str, *, file: str = "", tensor: str = "", offset: int = 0):
        super().__init__(message)
        self.file, self.tensor, self.offset = file, tensor, offset


class TraceError(TierlmError):
    """A trace that is incomplete, malformed, or contradicts itself. Names the line or the offset."""
