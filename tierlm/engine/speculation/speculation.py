"""Speculative decoding (Leviathan et al., arXiv 2211.17192): a step verifies drafts of the next tokens.

Each token is sampled from the model's own logits as without drafts, and drafts are accepted while they are these
tokens. So a draft is accepted with the probability that the model gives it, and nothing else changes: greedy tokens,
seeded samples, penalties, constraints and logprobs are those without drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sized
from typing import NamedTuple

from torch import Tensor

from tierlm.engine.sequence import Sequence
from tierlm.engine.speculation.drafter import Drafter
from tierlm.engine.speculation.gate import Gate
from tierlm.policies.prefetch import Average

ROWS = 8  # of a step with drafts: compiled kernels compute each of so many rows as they compute one alone
UNKNOWN = 0.5  # how likely a draft is right, of a kind that was never seen
CARRIED = 4  # observations that what earlier sequences have shown counts for in a new one


class Proposal(NamedTuple):
    """Drafts of one sequence that had ``before`` new tokens. The first ``wanted`` are verified, all are judged."""

    before: int
    kinds: list[int]
    drafts: list[int]
    wanted: int

    @property
    def verified(self) -> list[int]:
        return self.drafts[: self.wanted]


class Speculation:
    """The drafts of all sequences. ``make``: makes the drafter of one. ``width``: of the states that drafters observe;
    0: none."""

    def __init__(self, make: Callable[[], Drafter], gate: Gate, width: int = 0):
        self.make, self.gate, self.width = make, gate, width
        self._chances: dict[int, Average] = {}  # by kind, of all sequences

    def propose(self, batch: Sized[Sequence]) -> list[Proposal]:
        """What the next decode step of ``batch`` verifies."""
        room = max(0, ROWS - len(batch))
        kinds = [self._drafter(sequence).kinds(sequence, _most(sequence, room)) for sequence in batch]
        chances = [
            [self._chance(sequence, kind).value for kind in each] for sequence, each in zip(batch, kinds, strict=True)
        ]
        found = []
        for sequence, each, count in zip(batch, kinds, self.gate.choose(chances, room), strict=True):
            drafter = self._drafter(sequence)
            drafts = drafter.draft(sequence, len(each) if drafter.free else count)
            found.append(Proposal(len(sequence.ids), each, drafts, count))
        return found

    def observe(self, sequence: Sequence, states: Tensor) -> None:
        """See ``Drafter``."""
        self._drafter(sequence).observe(sequence, states)

    def learn(self, batch: Sized[Sequence], proposals: Sized[Proposal], seconds: float) -> None:
        """The step has run, and took ``seconds`` with its drafts."""
        tokens = 0
        for sequence, proposal in zip(batch, proposals, strict=True):
            new = sequence.ids[proposal.before :]
            tokens += len(new)
            for kind, draft, token in zip(proposal.kinds, proposal.drafts, new, strict=False):
                for average in (self._chance(sequence, kind), self._chances.setdefault(kind, Average())):
                    average.add(float(draft == token))
                if draft != token:
                    break
        self.gate.add(len(batch), sum(len(proposal.verified) for proposal in proposals), tokens, seconds)

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence.drafter is None:
            sequence.drafter = self.make()
        return sequence.drafter

    def _chance(self, sequence: Sequence, kind: int) -> Average:
        """How likely a draft of ``kind`` is right, in this sequence."""
        found = sequence.chances.get(kind)
        if found is None:
            found = sequence.chances[kind] = Average()
            known = self._chances.get(kind)
            found.value = UNKNOWN if known is None else known.value
            found.count = 0 if known is None else min(known.count, CARRIED)
        return found


def _most(sequence: Sequence, room: int) -> int:
    """How many drafts are of use: the last token is never fed back, and drafts take no room that is not there."""
    assert sequence.span is not None
    left = min(sequence.limit - len(sequence.ids), sequence.span.capacity - sequence.span.length)
    return max(0, min(room, left - 1))
