"""Predictors by name."""

from __future__ import annotations

from tierlm.policies.history import Ensemble, Frequency, PreviousToken, Transition
from tierlm.policies.prediction import GateLookahead, NoPredictor, Predictor
from tierlm.policies.registry import lookup

PREDICTORS: dict[str, type[Predictor]] = {
    "none": NoPredictor,
    "gate": GateLookahead,
    "previous": PreviousToken,
    "frequency": Frequency,
    "transition": Transition,
    "ensemble": Ensemble,
}


def make_predictor(name: str, width: int) -> Predictor:
    """A predictor by name, or by ``"module:Class"``. Raises UsageError for an unknown one."""
    return lookup("predictor", name, PREDICTORS, Predictor)(width)
