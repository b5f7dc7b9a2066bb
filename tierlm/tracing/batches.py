"""Traces of batches, made of the sequences of another trace."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError
from tierlm.tracing.trace import Trace


def batched(trace: Trace, size: int) -> Trace:
    """The decode tokens of ``trace`` in steps of ``size`` sequences each, as if these had run together: when one ends,
    the next takes its place. It stops when fewer than ``size`` are left.

    Too few sequences are cut into pieces of equal length. Prefills are left out. A trace whose decode steps have
    ``size`` tokens is returned as it is. Raises TraceError if the tokens do not make one step.
    """
    demands = trace.demands
    if demands.prefill.all():
        raise TraceError("expected decode steps, found a prefill alone")
    if (demands.tokens[~demands.prefill] == size).all():
        return trace
    pieces = _pieces(trace, size)
    ends = [(0, lane) for lane in range(size)]  # (tokens, lane), a heap
    lanes: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(size)]
    numbers: list[list[npt.NDArray[np.int32]]] = [[] for _ in range(size)]
    for number, piece in enumerate(pieces):
        length, lane = ends[0]
        lanes[lane].append(piece)
        numbers[lane].append(np.full(len(piece), number, np.int32))
        heapq.heapreplace(ends, (length + len(piece), lane))
    steps = ends[0][0]
    if not steps:
        raise TraceError(f"expected at least {size} decode tokens, found {sum(map(len, pieces))}")
    rows = np.stack([np.concatenate(lane)[:steps] for lane in lanes], axis=1).ravel()  # [steps * size]
    return replace(
        trace,
        experts=trace.experts[rows],
        sequences=np.stack([np.concatenate(lane)[:steps] for lane in numbers], axis=1).ravel(),
        steps=np.repeat(np.arange(steps, dtype=np.int32), size),
        prefill=np.zeros(len(rows), bool),
        scores=None if trace.scores is None else trace.scores[rows],
        predictions=None if trace.predictions is None else trace.predictions[rows],
    )


def _pieces(trace: Trace, size: int) -> list[npt.NDArray[np.intp]]:
    """The places of the decode tokens of each sequence, in order of first use; cut into at least ``size`` pieces."""
    decode = np.flatnonzero(~trace.prefill)
    order = np.argsort(trace.sequences[decode], kind="stable")
    cuts = np.flatnonzero(np.diff(trace.sequences[decode][order])) + 1
    found = sorted(np.split(decode[order], cuts), key=lambda places: places[:1].tolist())
    if len(found) >= size:
        return found
    length = max(1, len(decode) // size)
    return [places[at : at + length] for places in found for at in range(0, len(places), length)]
