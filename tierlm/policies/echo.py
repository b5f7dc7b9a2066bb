"""The default policy: what followed when the model was in a similar state before?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tierlm.policies.eviction import Bounds, Setting
from tierlm.policies.forecast import Floats
from tierlm.policies.hazard import Hazard

LONGEST = 32  # records that one token uses of a layer; a turn with more is a prefill's, and is not remembered
FOLLOWERS = 5  # tokens after a similar one that are looked at


@dataclass(slots=True)
class Past:
    """What the last tokens, in a ring, used of one layer."""

    member: NDArray[np.uint8]  # [experts, tokens] 1 where the token used the record
    used: NDArray[np.intp]  # [tokens, width] the indices; -1: no more


class Echo(Hazard):
    """Hazard, and beside it the vote of similar tokens. Of the ``memory`` last tokens, the ``neighbours`` whose choices
    in the layers so far overlap most with the present one's say what the tokens after them used, by ``fade`` a token
    less. log P is the mean of the logarithms of a record's share of the votes, which has the weight ``echo``, and of
    its hazard.

    Votes weigh exp(``sharpness`` x overlap), overlap 1 where all choices are the same; among them the hazard counts as
    much as one neighbour with an overlap of a half. Nearest neighbours as in the memory of past sequences of
    MoE-Infinity (Xue et al., arXiv 2401.14361), which prefetches by it.
    """

    tunable: ClassVar[Bounds] = {
        **Hazard.tunable,
        "memory": (64, 4096),
        "neighbours": (4, 256),
        "sharpness": (2.0, 30.0),
        "fade": (0.0, 0.9),
        "echo": (0.0, 1.0),
    }

    def __init__(
        self,
        setting: Setting,
        *,
        slow: float = 0.02,
        prior: float = 5.0,
        memory: int = 1000,
        neighbours: int = 16,
        sharpness: float = 9.0,
        fade: float = 0.6,
        echo: float = 0.6,
    ):
        super().__init__(setting, slow=slow, prior=prior)
        self.memory, self.neighbours, self.sharpness, self.echo = memory, neighbours, sharpness, echo
        self._fading: Floats = np.float32(fade) ** np.arange(FOLLOWERS, dtype=np.float32)
        self._steps = np.arange(1, FOLLOWERS + 1)
        self._past: dict[int, Past] = {}
        self._present = -1  # the token that the next two are about
        self._overlap = np.zeros(memory, np.float32)  # [tokens] choices in common with it so far
        self._choices = 0  # that it has made so far

    def learn(self, layer: int, used: list[int]) -> None:
        hazard = self.hazard(layer, used)
        votes = self._vote(layer, used, hazard)
        self.forecast(layer, np.power(hazard, 1 - self.echo) * np.power(votes, self.echo))

    def _vote(self, layer: int, used: list[int], hazard: Floats) -> Floats:
        """[experts] the share of the votes."""
        if self.token != self._present:
            self._present, self._choices = self.token, 0
            self._overlap[:] = 0
        past, now = self._past_of(layer, len(used)), self.token % self.memory
        past.member[:, now] = 0
        past.used[now] = -1
        if len(used) > LONGEST:
            return hazard
        self._overlap += past.member[used].sum(0, dtype=np.uint8)
        self._choices += len(used)
        past.member[used, now] = 1
        past.used[now, : len(used)] = used
        alike = self._overlap / self._choices
        alike[now] = -1
        known = min(self.token, self.memory - 1)  # tokens before this one
        if known > self.neighbours:
            nearest = alike.argpartition(-self.neighbours)[-self.neighbours :]
        else:
            nearest = np.arange(now - known, now) % self.memory
        after = nearest[:, None] + self._steps  # [neighbours, FOLLOWERS]
        past_or_now = (now - nearest)[:, None] % self.memory >= self._steps
        weights = np.exp(self.sharpness * (alike[nearest, None] - 0.5)) * self._fading * past_or_now
        choices = past.used[after % self.memory]  # [neighbours, FOLLOWERS, width]
        each = weights.repeat(choices.shape[2])
        votes = np.bincount(choices.ravel() + 1, each, self.experts + 1)[1:]
        trust = self._fading.sum()
        shares: Floats = ((votes + trust * hazard) / (weights.sum() + trust)).astype(np.float32)
        return shares

    def _past_of(self, layer: int, width: int) -> Past:
        """That of ``layer``, as wide as there are experts, and as this turn has choices."""
        past = self._past.get(layer)
        if past is None:
            past = self._past[layer] = Past(
                np.zeros((0, self.memory), np.uint8), np.full((self.memory, 0), -1, dtype=np.intp)
            )
        if (missing := self.experts - len(past.member)) > 0:
            past.member = np.pad(past.member, ((0, missing), (0, 0)))
        if (missing := min(width, LONGEST) - past.used.shape[1]) > 0:
            past.used = np.pad(past.used, ((0, 0), (0, missing)), constant_values=-1)
        return past
