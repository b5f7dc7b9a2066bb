"""Recorded routing, for forecasts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError
from tierlm.planning.cost import Work
from tierlm.policies import DEFAULT
from tierlm.tracing.batches import batched
from tierlm.tracing.replay import open_policy, replay
from tierlm.tracing.trace import Trace

TOKENS = 2000  # of a trace that are replayed, so that a plan takes seconds


class RecordedHits:
    """The routing of a trace's decode steps, with hit rates under the default policy. The first half of the trace only
    fills the slots. Other numbers of sequences than the trace has are made of its sequences: see ``batched``.

    A trace of another model is replayed at the same share of experts. Raises TraceError if nothing is left to count.
    """

    def __init__(self, trace: Trace):
        self._trace = trace
        self._steps: dict[int, tuple[Trace, npt.NDArray[np.bool_]]] = {}
        self._found: dict[tuple[int, int], float] = {}
        self._counted(1)

    def used(self, batch: int) -> float:
        """Distinct experts of a layer that a step of ``batch`` sequences uses, in the mean."""
        trace, counted = self._counted(batch)
        return float(trace.demands.counts[counted].mean())

    def rate(self, share: float, batch: int = 1) -> float:
        """The hit rate with slots for ``share`` of all experts, at least for one token's in a layer."""
        trace, counted = self._counted(batch)
        slots = min(trace.records, max(trace.experts.shape[2], round(share * trace.records)))
        if (slots, batch) not in self._found:
            policy = open_policy(DEFAULT, trace, slots)
            self._found[slots, batch] = replay(trace, policy, slots, counted).hit_rate
        return self._found[slots, batch]

    def describe(self, work: Work) -> str:
        """The replayed trace in words, and whether it is another model's."""
        trace, _ = self._counted(1)
        layers, experts, chosen = trace.moe_layers, trace.info.experts, int(trace.experts.shape[2])
        model = trace.info.model or "a model"
        found = f"{len(trace)} tokens of {model}, policy {DEFAULT}"
        if (layers, experts, chosen) == (work.moe_layers, work.experts, work.experts_per_token):
            return found
        return f"{found}; another model, {layers} layers with {chosen} of {experts} experts, at the same share of slots"

    def _counted(self, batch: int) -> tuple[Trace, npt.NDArray[np.bool_]]:
        """The steps of ``batch`` sequences, and which of them count."""
        if batch not in self._steps:
            trace = batched(self._trace, batch).part(0, TOKENS)
            counted = ~trace.demands.prefill
            counted[: len(counted) // 2] = False
            if not counted.any():
                raise TraceError("expected decode steps in the second half of the trace, found a prefill alone")
            self._steps[batch] = trace, counted
        return self._steps[batch]
