"""The replay, compiled: the classic policies' decisions in C++, for traces of millions of demands.

The classes of ``tierlm.policies`` are the reference, and the engine's; each file here says of which of them it is the
twin. Without a compiler, or for a policy without a twin, ``tracing.replay`` asks those.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierlm.library import find_library
from tierlm.policies.belady import Belady
from tierlm.policies.eviction import Policy
from tierlm.policies.frequency import Lfu, LfuAgeing, LruK
from tierlm.policies.queues import Arc, S3Fifo, TwoQ
from tierlm.policies.recency import Clock, Fifo, LayerLru, Lru, Sieve
from tierlm.tracing.trace import Demands

Counts = npt.NDArray[np.int32]

NAMES: dict[type[Policy], str] = {
    Lru: "lru",
    LayerLru: "layer-lru",
    Fifo: "fifo",
    Clock: "clock",
    Sieve: "sieve",
    TwoQ: "2q",
    S3Fifo: "s3-fifo",
    Arc: "arc",
    Lfu: "lfu",
    LfuAgeing: "lfu-ageing",
    LruK: "lru-k",
    Belady: "belady",
}


def has_twin(policy: Policy) -> bool:
    """Whether ``policy`` is one that this folder knows; a class that derives from one may do anything."""
    return load() is not None and type(policy) in NAMES


def replay(policy: Policy, demands: Demands, experts: int, places: Counts | None) -> tuple[Counts, Counts]:
    """What ``policy``, which has a twin and has seen nothing, misses with as many slots as its setting has.

    ``experts``: of a layer; ``places``: int32 [L, experts], where on the disk each lies, None: by number. Returns
    ``counts`` and ``behind`` of ``replay.Misses``.
    """
    library = load()
    assert library is not None
    prefill = demands.prefill
    missed = np.empty(demands.ends.shape, np.int32)
    behind = np.empty(int(demands.counts[prefill].sum()), np.int32)
    parameters = np.array(_parameters(policy), np.float64)
    error = library.tierlm_replay(
        NAMES[type(policy)].encode(),
        *(array.ctypes for array in (parameters, demands.ids, demands.ends)),
        missed.size,
        prefill.ctypes,
        None if places is None else places.ctypes,
        demands.layers,
        experts,
        policy.info.capacity,
        *(array.ctypes for array in (missed, behind)),
    )
    if error:
        raise RuntimeError("no slot can be had: fewer than one slot, or this is a bug in tierlm")
    return missed, behind[: int(missed[prefill].sum())]


def _parameters(policy: Policy) -> tuple[float, ...]:
    """As the twin expects them."""
    if isinstance(policy, TwoQ):
        return policy.limit, policy.ghost_limit
    if isinstance(policy, S3Fifo):
        return policy.limit, policy.ghost_limit, policy.uses
    if isinstance(policy, Clock):
        return (policy.lives,)
    if isinstance(policy, LruK):
        return (policy.k,)
    return ()


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built."""
    file = find_library(Path(__file__).parent)
    if file is None:
        return None
    library, pointer = ctypes.CDLL(str(file)), ctypes.c_void_p
    library.tierlm_replay.argtypes = [
        ctypes.c_char_p,
        *[pointer] * 3,
        ctypes.c_int64,
        *[pointer] * 2,
        *[ctypes.c_int] * 3,
        *[pointer] * 2,
    ]
    return library
