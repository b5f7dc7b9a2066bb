"""The expected hit rate of recorded routing."""

from __future__ import annotations

from tierlm.errors import TraceError
from tierlm.planning.cost import Work
from tierlm.policies import DEFAULT
from tierlm.tracing.replay import open_policy, replay
from tierlm.tracing.trace import Trace

TOKENS = 2000  # of a trace that are replayed, so that a plan takes seconds


class RecordedHits:
    """Hit rates of a trace's decode steps under the default policy. The first half of the trace only fills the slots.

    A trace of another model is replayed at the same share of experts. Raises TraceError if nothing is left to count.
    """

    def __init__(self, trace: Trace):
        self._trace = trace.part(0, TOKENS)
        self._found: dict[int, float] = {}
        self._counted = ~self._trace.demands.prefill
        self._counted[: len(self._counted) // 2] = False
        if not self._counted.any():
            raise TraceError("expected decode steps in the second half of the trace, found a prefill alone")

    def rate(self, share: float) -> float:
        """The hit rate with slots for ``share`` of all experts, at least for one token's in a layer."""
        trace = self._trace
        slots = min(trace.records, max(trace.experts.shape[2], round(share * trace.records)))
        if slots not in self._found:
            policy = open_policy(DEFAULT, trace, slots)
            self._found[slots] = replay(trace, policy, slots, self._counted).hit_rate
        return self._found[slots]

    def describe(self, work: Work) -> str:
        """The replayed trace in words, and whether it is another model's."""
        trace = self._trace
        layers, experts, chosen = trace.moe_layers, trace.info.experts, int(trace.experts.shape[2])
        model = trace.info.model or "a model"
        found = f"{len(trace)} tokens of {model}, policy {DEFAULT}"
        if (layers, experts, chosen) == (work.moe_layers, work.experts, work.experts_per_token):
            return found
        return f"{found}; another model, {layers} layers with {chosen} of {experts} experts, at the same share of slots"
