"""The default policy: what followed when the model was in a similar state before?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tierlm.policies.eviction import Bounds, TierInfo
from tierlm.policies.forecast import Floats, Indices
from tierlm.policies.hazard import Hazard

LONGEST = 32  # records that one token uses of a layer; a turn with more is a prefill's, and is not remembered
FOLLOWERS = 16  # tokens after a similar one that are looked at, at most,
FAINT = 0.03  # and as long as they count for so much of the first one
QUICK = 0.25  # how fast the share of the last turns forgets, a turn
UNUSED = 3e-4  # of the last turns, which is less likely to be used than nothing can be


@dataclass(slots=True)
class Past:
    """What the last tokens, in a ring, used of one layer."""

    member: NDArray[np.uint8]  # [experts, tokens] 1 where the token used the record
    used: Indices  # [tokens, width] the indices plus one; 0: no more
    recent: Floats  # [experts] share of the last turns that used the record


class Echo(Hazard):
    """Hazard, and beside it the vote of similar tokens. Of the ``memory`` last tokens, the ``neighbours`` whose choices
    in the layers so far overlap most with the present one's say what the tokens after them used. log P is a sum of
    logarithms: of a record's share of the votes, with the weight ``echo``, of its hazard, with 1 - ``echo``, and of its
    share of the last four turns or so, with ``recent``.

    Each follower's vote counts L / (L + ``soon``) of that of the one before, where the slots hold what L tokens demand:
    a record stays for long where there are many slots, and is kept for what comes late as well.

    Votes weigh exp(``sharpness`` x overlap), overlap 1 where all choices are the same; among them the hazard counts as
    much as one neighbour with an overlap of a half. Nearest neighbours as in the memory of past sequences of
    MoE-Infinity (Xue et al., arXiv 2401.14361), which prefetches by it.
    """

    tunable: ClassVar[Bounds] = {
        **Hazard.tunable,
        "memory": (64, 4096),
        "neighbours": (4, 256),
        "sharpness": (2.0, 30.0),
        "soon": (0.2, 20.0),
        "echo": (0.0, 1.0),
        "recent": (0.0, 1.0),
    }

    def __init__(
        self,
        info: TierInfo,
        *,
        slow: float = 0.02,
        prior: float = 5.0,
        memory: int = 1000,
        neighbours: int = 32,
        sharpness: float = 9.0,
        soon: float = 2.0,
        echo: float = 0.65,
        recent: float = 0.1,
    ):
        super().__init__(info, slow=slow, prior=prior)
        self.memory, self.neighbours, self.sharpness = memory, neighbours, sharpness
        self.soon, self.echo, self.recent = soon, echo, recent
        self._past: dict[int, Past] = {}
        self._present = -1  # the token that the next two are about
        self._overlap = np.zeros(memory, np.int16)  # [tokens] choices in common with it so far
        self._choices = 0  # that it has made so far
        self._demands = 0  # choices of a token, of the last one that is known
        self._steps = np.ones(1, np.intp)  # [followers] tokens after a neighbour
        self._fading = np.zeros((1, 1))  # [tokens since the neighbour, followers] what they count for, once known
        self._trust = 1.0  # what the hazard counts for

    def learn(self, layer: int, used: Indices) -> None:
        hazard = self.hazard(layer, used)
        past = self._past_of(layer, len(used))
        past.recent *= 1 - QUICK
        past.recent[used] += QUICK
        logs = self.recent * np.log(past.recent + UNUSED)
        logs += (1 - self.echo) * np.log(hazard)
        logs += self.echo * np.log(self._vote(past, used, hazard))
        self.forecast(layer, logs)

    def _vote(self, past: Past, used: Indices, hazard: Floats) -> Floats:
        """[experts] the share of the votes."""
        now = self.token % self.memory
        if self.token != self._present:
            self._next_token(now)
        past.member[:, now] = 0
        past.used[now] = 0
        if len(used) > LONGEST:
            return hazard
        self._overlap += np.add.reduce(past.member.take(used, 0), 0, np.uint8)
        self._choices += len(used)
        past.member[used, now] = 1
        past.used[now, : len(used)] = used + 1
        known = min(self.token, self.memory - 1)  # tokens before this one
        if known > self.neighbours:
            nearest = self._overlap.argpartition(-self.neighbours)[-self.neighbours :]
        else:
            nearest = np.arange(now - known, now) % self.memory
        alike = self._overlap.take(nearest) / self._choices
        ago = (now - nearest) % self.memory  # tokens
        weights = np.exp(self.sharpness * (alike - 0.5))[:, None] * self._fading.take(ago, 0, mode="clip")
        choices = past.used.take(nearest[:, None] + self._steps, 0, mode="wrap")  # [neighbours, followers, width]
        votes = np.bincount(choices.ravel(), weights.repeat(choices.shape[2]), self.experts + 1)[1:]
        shares: Floats = (votes + self._trust * hazard).astype(np.float32)
        shares /= np.add.reduce(weights, None) + self._trust
        return shares

    def _next_token(self, now: int) -> None:
        if self._choices and self._choices != self._demands:
            self._demands = self._choices
            life = self.info.capacity / self._demands
            fade = life / (life + self.soon)
            followers = min(FOLLOWERS, 1 + int(math.log(FAINT) / math.log(fade)))
            self._steps = np.arange(1, followers + 1)
            self._fading = np.tri(followers + 1, followers, -1) * fade ** (self._steps - 1)
            self._trust = float(self._fading[-1].sum())
        self._present, self._choices = self.token, 0
        self._overlap[:] = 0
        self._overlap[now] = -1  # it is no neighbour of its own

    def _past_of(self, layer: int, width: int) -> Past:
        """That of ``layer``, as wide as there are experts, and as this turn has choices."""
        past = self._past.get(layer)
        if past is None:
            past = self._past[layer] = Past(
                np.zeros((0, self.memory), np.uint8), np.zeros((self.memory, 0), np.intp), np.zeros(0, np.float32)
            )
        if (missing := self.experts - len(past.member)) > 0:
            past.member = np.pad(past.member, ((0, missing), (0, 0)))
            past.recent = np.pad(past.recent, (0, missing))
        if (missing := min(width, LONGEST) - past.used.shape[1]) > 0:
            past.used = np.pad(past.used, ((0, 0), (0, missing)))
        return past
