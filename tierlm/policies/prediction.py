"""Predictors: which records will be demanded next. Pure Python; no torch.

To add one: a class, and a line in PREDICTORS (policies/predictors.py), or a name such as ``"my.module:MyPredictor"``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tierlm.spec import ExpertKey


class Predictor(ABC):
    """Predicts a layer's experts before it runs. ``width``: experts a token chooses.

    ``lookahead``: how many layers ahead it is asked; 0: never. ``gates``: whether the executor shall then evaluate the
    gate of that layer on the hidden state as it is now, and report the outcome through ``observe_gate`` first; such a
    predictor is asked once more just before the layer's attention. A prefill asks those with gates only.
    """

    lookahead: int = 1
    gates: bool = False

    def __init__(self, width: int):
        self.width = width

    @abstractmethod
    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """``layer`` has chosen ``experts``."""

    def observe_gate(self, layer: int, ranked: Sequence[int]) -> None:
        """``layer``, which has not run yet, would choose ``ranked`` from what is known now, the likeliest first."""

    @abstractmethod
    def predict(self, layer: int) -> list[ExpertKey]:
        """The records that ``layer`` is likely to demand, the likeliest first."""


class NoPredictor(Predictor):
    """Never predicts."""

    lookahead = 0

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Learns nothing."""

    def predict(self, layer: int) -> list[ExpertKey]:
        return []


class GateLookahead(Predictor):
    """A layer's own gate, on the hidden state that enters an earlier layer's experts or the layer's attention: the
    residual stream changes little from one layer to the next (as in Eliseev and Mazur, arXiv 2312.17238)."""

    lookahead = 2
    gates = True

    def __init__(self, width: int):
        super().__init__(width)
        self._ranked: dict[int, Sequence[int]] = {}

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self._ranked.pop(layer, None)

    def observe_gate(self, layer: int, ranked: Sequence[int]) -> None:
        self._ranked[layer] = ranked

    def predict(self, layer: int) -> list[ExpertKey]:
        return [ExpertKey(layer, expert) for expert in self._ranked.get(layer, ())]
