"""Traces of any shape, for hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tierlm.tracing.trace import Trace, TraceInfo


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Runs of a few tokens: prefills of up to six, decode steps of up to three. Some layers have fewer choices than
    others, or none; with or without an order on disk."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    chosen = draw(st.integers(1, min(4, experts)))
    sizes = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=40))
    tokens = [size if prefill else 1 + size % 3 for prefill, size in sizes]
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    favourites = chance.random((layers, experts)) * draw(st.sampled_from([0.0, 1.0, 3.0]))
    ids = np.argsort(-favourites - chance.random((sum(tokens), layers, experts)), axis=2)[:, :, :chosen]
    ids[chance.random(ids.shape) < draw(st.sampled_from([0.0, 0.2]))] = -1
    if (ids < 0).all():
        ids[0, 0, 0] = 0
    order = tuple(tuple(chance.permutation(experts).tolist()) for _ in range(layers)) if draw(st.booleans()) else ()
    steps = np.repeat(np.arange(len(sizes), dtype=np.int32), tokens)
    prefill = np.repeat(np.array([prefill for prefill, _ in sizes]), tokens)
    info = TraceInfo("toy", layers + 1, tuple(range(1, layers + 1)), experts, order=order)
    return Trace(info, ids.astype(np.int16), np.zeros(len(ids), np.int32), steps, prefill)
