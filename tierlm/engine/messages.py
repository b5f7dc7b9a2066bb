"""What clients put into the inbox of the engine thread.

A queue of these is all that the two sides share: `queue.SimpleQueue` is atomic in C, so a KeyboardInterrupt in a client
finds a message sent or not sent, and never a lock held.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierlm.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Submit:
    """Run these sequences."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Their client waits for the next token of one of them."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Their client is gone. Harmless before they are submitted, and after they have ended."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Close the model, or stop loading it."""


Message = Submit | Ask | Cancel | Close
