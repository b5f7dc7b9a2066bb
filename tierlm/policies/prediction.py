"""Predictors: which records will be demanded next.

To add one, write a subclass and a line in PREDICTORS (policies/predictors.py), or name it ``"my.module:MyPredictor"``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tierlm.spec import ExpertKey


class Predictor(ABC):
    """Predicts a layer's experts before it runs. ``width``: experts per token.

    ``lookahead``: how many layers ahead it is asked; 0: never. ``gates``: before each prediction the engine evaluates
    that layer's router on the current hidden state and calls ``observe_gate`` with the result; it asks again just
    before the layer's attention. A prefill asks only predictors with ``gates``.
    """

    lookahead: int = 1
    gates: bool = False

    def __init__(self, width: int):
        self.width = width

    @abstractmethod
    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """``layer`` has run with ``experts``."""

    def observe_gate(self, layer: int, ranked: Sequence[int]) -> None:
        """The router of ``layer``, evaluated early, prefers ``ranked``, the likeliest first."""

    @abstractmethod
    def predict(self, layer: int) -> list[ExpertKey]:
        """The records that ``layer`` will probably demand, the likeliest first."""


class NoPredictor(Predictor):
    """Never predicts."""

    lookahead = 0

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Learns nothing."""

    def predict(self, layer: int) -> list[ExpertKey]:
        return []


class GateLookahead(Predictor):
    """Asks a layer's own router early, on the hidden state before an earlier layer's experts or before its attention:
    the residual stream changes little between layers (as in Eliseev and Mazur, arXiv 2312.17238)."""

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
