"""One request: its prompt, its tokens and its state."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from enum import Enum, auto

from torch import Tensor

from tierlm.config import SamplingParams
from tierlm.engine.sampler import Sampler, TokenLogprob
from tierlm.errors import StorageError
from tierlm.memory.kvcache import Span


class State(Enum):
    """WAITING: for room in the KV cache. PREFILL: until the whole prompt has run."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Progress:
    """New ``ids`` of a sequence, including a stop id. ``finish``: None until it ends, then "stop", "length" or "error";
    "error" also sets ``error``. ``logprobs``: of each new id, or empty if not asked for."""

    ids: list[int]
    finish: str | None
    error: StorageError | None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its generated tokens, ``ids``. Only the scheduler changes it, except ``cancelled``.

    ``capacity``: tokens reserved in the KV cache. ``limit``: maximum of new tokens. ``logits``: float32 [T, vocab];
    if set, filled for every prompt token, and nothing is generated. ``done``: prompt tokens that have run. ``taken``:
    new tokens that the caller has read.
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
    logprobs: list[TokenLogprob] = field(default_factory=list)
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
        """Whether the caller has yet to read a token. Such a sequence pauses."""
        return len(self.ids) > self.taken

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    def take(self) -> Progress:
        """Return the new tokens and mark them read."""
        new, logprobs, self.taken = self.ids[self.taken :], self.logprobs[self.taken :], len(self.ids)
        return Progress(new, self.finish, self.error, logprobs)

    def cancel(self) -> None:
        """Let the scheduler drop it before its next step. Thread-safe."""
        self.cancelled = True
