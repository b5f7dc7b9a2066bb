"""One request's tokens, from the prompt to the end."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from enum import Enum, auto

from torch import Tensor

from tierlm.config import SamplingParams
from tierlm.engine.sampler import Sampler
from tierlm.errors import StorageError
from tierlm.memory.kvcache import Span


class State(Enum):
    """WAITING for room in the KV cache; PREFILL until the whole prompt has run; DECODE; ENDED."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Progress:
    """What is new of a sequence: ``ids``, a stop id included. ``finish``: None while it goes on, then "stop", "length"
    or "error"; ``error`` is set with the last one."""

    ids: list[int]
    finish: str | None
    error: StorageError | None


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated after it. The scheduler alone changes it, but for ``cancelled``.

    ``capacity``: tokens that it may need in the KV cache. ``limit``: new tokens, at most. ``logits``: float32
    [T, vocab], to be filled after every token of the prompt; then nothing is generated. ``done``: tokens of the prompt
    that have run. ``taken``: new tokens that its owner has seen.
    """

    prompt: abc.Sequence[int]
    params: SamplingParams
    capacity: int
    limit: int
    logits: Tensor | None = None
    state: State = State.WAITING
    span: Span | None = None
    done: int = 0
    ids: list[int] = field(default_factory=list)
    taken: int = 0
    finish: str | None = None
    error: StorageError | None = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params)

    @property
    def unread(self) -> bool:
        """Whether there is a token that its owner has not seen. Such a sequence does not run on."""
        return len(self.ids) > self.taken

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    def take(self) -> Progress:
        """Hand out what is new."""
        new, self.taken = self.ids[self.taken :], len(self.ids)
        return Progress(new, self.finish, self.error)

    def cancel(self) -> None:
        """Nobody waits for it any more: the scheduler drops it before its next step. From any thread, at any time."""
        self.cancelled = True
