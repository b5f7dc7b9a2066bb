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
    ├── NumericsError           a model's logits are not finite; names the layer where that began
    └── TraceError              a recorded trace is incomplete, malformed, or contradicts itself

A message says what was expected, what was found, where, and what to do. It is printable and of bounded length,
whatever names and values a file contains.
"""

from __future__ import annotations

import reprlib
import traceback
from typing import TypeVar

E = TypeVar("E", bound=BaseException)
MAX_MESSAGE = 4000  # characters

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlist = _short.maxtuple = _short.maxdict = 12


def shown(value: object) -> str:
    """A short ``repr`` of a value from a file, which may be large or deeply nested."""
    return _short.repr(value)


class TierlmError(Exception):
    """Base class of all errors of tierlm."""

    exit_code = 1

    def __init__(self, message: str = ""):
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
        if not message.isprintable():
            message = "".join(
                c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message
            )
        super().__init__(message)


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


class NumericsError(TierlmError):
    """Logits that are not finite. ``layer``: where values first were not; None: in the embedding, or after the last."""

    def __init__(self, message: str, *, layer: int | None = None):
        super().__init__(message)
        self.layer = layer


class TraceError(TierlmError):
    """A trace that is incomplete, malformed, or contradicts itself. Names the line or the offset."""


def forget_frames(error: E) -> E:
    """Drop the local variables that the tracebacks of ``error`` and its causes keep alive, such as a loaded model."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
    return error
