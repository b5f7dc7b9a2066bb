"""Echo, the default policy: predicts what followed similar tokens before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tierlm.policies.eviction import Bounds, TierInfo
from tierlm.policies.forecast import Floats, Indices
from tierlm.policies.hazard import Hazard

LONGEST = 32  # records a token uses of a layer; a longer turn is a prefill and is not remembered
FOLLOWERS = 16  # at most so many tokens after a similar one vote,
FAINT = 0.03  # as long as their weight is this share of the first one's
QUICK = 0.25  # decay of the recent share, per turn
UNUSED = 3e-4  # added to the recent share: keeps the logarithm finite


@dataclass(slots=True)
class Past:
    """The records of one layer that the last tokens used, in a ring."""

    member: NDArray[np.uint8]  # [experts, tokens] 1 where the token used the record
    used: Indices  # [tokens, width] indices plus one; 0: none
    recent: Floats  # [experts] share of recent turns that used the record


class Echo(Hazard):
    """Hazard combined with a vote of similar tokens. Of the last ``memory`` tokens, the ``neighbours`` whose experts in
    the layers so far overlap most with the present token's vote for the records that the tokens after them used. log P
    is the sum of ``echo`` x log(share of votes), (1 - ``echo``) x log(hazard) and ``recent`` x log(share of about the
    last four turns).

    Where the slots hold the demands of L tokens, each follower's vote weighs L / (L + ``soon``) of the one before: with
    many slots a record stays long, so later uses count too.

    A neighbour weighs exp(``sharpness`` x overlap), overlap 1 if all experts agree; the hazard weighs as much as one
    neighbour of overlap 1/2. MoE-Infinity (Xue et al., arXiv 2401.14361) prefetches by such nearest neighbours.
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
        self._present = -1  # the token of the next two fields
        self._overlap = np.zeros(memory, np.int16)  # [tokens] experts in common with it so far
        self._choices = 0  # its experts so far
        self._demands = 0  # experts of the last complete token
        self._steps = np.ones(1, np.intp)  # [followers] tokens after a neighbour
        self._fading = np.zeros((1, 1))  # [tokens since the neighbour, followers] weights; 0: not known yet
        self._trust = 1.0  # weight of the hazard

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
        """[experts] shares of the votes."""
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
        self._overlap[now] = -1  # never its own neighbour

    def _past_of(self, layer: int, width: int) -> Past:
        """The past of ``layer``, extended to all experts and to the ``width`` of this turn."""
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
