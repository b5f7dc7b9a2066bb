"""One request: its prompt, its tokens and its state."""

from __future__ import annotations

import time
import weakref
from collections import abc
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from torch import Tensor

from tierlm.config import SamplingParams
from tierlm.engine.sampler import Sampler, TokenLogprob
from tierlm.engine.speculation.drafter import Drafter
from tierlm.errors import TierlmError
from tierlm.memory.kvcache import Span
from tierlm.policies.prefetch import Average

AGING = 60.0  # seconds that a request comes later for each unit of its priority


class State(Enum):
    """WAITING: for room in the KV cache, at first or again. LOADING: for KV values from disk. PREFILL: until all its
    tokens have run."""

    WAITING = auto()
    LOADING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class Progress:
    """New ``ids`` of the sequence at ``place`` of its request, including a stop id.

    ``finish``: None until it ends, then "stop", "length" or "error". ``error``: the failed read; None if the model was
    closed. ``logprobs``: of each new id; None if not asked for. ``cached``: see Sequence.
    """

    place: int
    ids: list[int]
    finish: str | None
    error: TierlmError | None
    logprobs: list[TokenLogprob] | None = None
    cached: int = 0


class Mailbox(Protocol):
    """Where the client finds the progress of a request. Both calls return at once."""

    def put(self, item: Progress, /) -> None: ...

    def empty(self) -> bool: ...


class Pace(Enum):
    """How a client reads a sequence.

    ASKED: it asks for each token, and the sequence pauses until the last one is taken. EACH: it wants every token as
    soon as it is there. END: it wants all tokens at once, at the end.
    """

    ASKED = auto()
    EACH = auto()
    END = auto()


@dataclass(eq=False)
class Keep:
    """Names the KV values that requests with this object leave for each other. They go with it. ``stored``: whether
    they may go to disk, too."""

    stored: bool = True


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its generated tokens, ``ids``. Only the engine thread changes it once it is submitted.

    ``place``: its index in the request that ``mailbox`` belongs to. ``logits``: float32 [T, vocab]; if set, filled for
    every prompt token, and nothing is generated. ``keep``: whose KV values it takes up and leaves. ``capacity``: tokens
    to reserve in the KV cache when it is admitted. ``limit``: maximum of new tokens. ``cached``: prompt tokens whose KV
    values were there. ``done``: tokens that have run, those included. ``prefilled``: those of them that are prompt
    tokens, with a share for the layers that have run of the present step; the client may read it. ``told``: new tokens
    that were put into the mailbox. ``asked``: the client waits for the next token. ``drafter``, ``chances``: what
    drafts its tokens, and how often drafts of each kind were right. ``request``: cancels the sequence when the client
    drops its request.
    """

    prompt: abc.Sequence[int]
    params: SamplingParams
    mailbox: Mailbox
    place: int = 0
    pace: Pace = Pace.ASKED
    logits: Tensor | None = None
    keep: Keep | None = None
    state: State = State.WAITING
    capacity: int = 0
    limit: int = 0
    span: Span | None = None
    cached: int = 0
    done: int = 0
    prefilled: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    told: int = 0
    asked: bool = True
    finish: str | None = None
    error: TierlmError | None = None
    drafter: Drafter | None = None
    chances: dict[int, Average] = field(default_factory=dict)
    request: weakref.ref[object] | None = None
    submitted: float = field(default_factory=time.perf_counter)
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.params)

    @property
    def wanted(self) -> bool:
        """Whether a client waits for this sequence."""
        return self.asked or self.pace is not Pace.ASKED

    @property
    def paused(self) -> bool:
        """Whether the client has yet to take a token."""
        return self.pace is Pace.ASKED and not self.mailbox.empty()

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    @property
    def rank(self) -> tuple[float, int]:
        """Who goes first: the smaller rank. It never changes, so the first of all goes on until it ends; and a sequence
        waits for those that come at most AGING seconds later for each unit of their advantage."""
        return self.submitted + self.params.priority * AGING, self.place

    @property
    def tokens(self) -> list[int]:
        """The ids of its prompt, and the new ones."""
        return [*self.prompt, *self.ids]

    @property
    def most(self) -> int:
        """Tokens that it may need in the KV cache; the last one is never fed back."""
        return len(self.prompt) + max(0, self.limit - 1)

    @property
    def computed(self) -> list[int]:
        """The ids whose KV values are in its span."""
        return [] if self.span is None else self.tokens[: self.span.length]

    def tell(self) -> None:
        """Put what is new into the mailbox, token by token unless the client wants all at the end."""
        if not self.ended and (len(self.ids) == self.told or self.pace is Pace.END):
            return
        self.asked = False
        while True:
            start, self.told = self.told, len(self.ids) if self.pace is Pace.END else min(self.told + 1, len(self.ids))
            new, logprobs = self.ids[start : self.told], self.logprobs[start : self.told]
            reported = None if self.params.logprobs is None else logprobs
            last = self.told == len(self.ids)
            finish, error = (self.finish, self.error) if last else (None, None)
            self.mailbox.put(Progress(self.place, new, finish, error, reported, self.cached))
            if last:
                return
