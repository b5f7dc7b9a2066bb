"""The compiled replay: the classic policies in C++, for traces of millions of demands.

The classes of ``tierlm.policies``, which the engine uses, are the reference; each file here names those of which it is
the twin. Without a compiler, or for a policy without a twin, ``tracing.replay`` calls the reference.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierlm.library import find_library
from tierlm.policies import POLICIES
from tierlm.policies.belady import Belady
from tierlm.policies.eviction import Policy
from tierlm.tracing.trace import Demands

Counts = npt.NDArray[np.int32]

PARAMETERS = {  # the attributes that a twin takes, in its order
    **dict.fromkeys(("lru", "layer-lru", "fifo", "sieve", "arc", "lfu", "lfu-ageing", "belady"), ()),
    "clock": ("lives",),
    "lru-k": ("k",),
    "2q": ("limit", "ghost_limit"),
    "s3-fifo": ("limit", "ghost_limit", "uses"),
}
NAMES = {POLICIES.get(name, Belady): name for name in PARAMETERS}


def has_twin(policy: Policy) -> bool:
    """Whether ``policy`` can run compiled; a subclass of a known policy cannot, as it may differ."""
    return load() is not None and type(policy) in NAMES


def replay(policy: Policy, demands: Demands, experts: int, places: Counts | None) -> tuple[Counts, Counts]:
    """Replay a new ``policy`` that has a twin, with the slots of its TierInfo. ``experts``: of a layer; ``places``:
    int32 [L, experts], as of ``replay.disk_places``. Returns ``counts`` and ``behind`` of ``replay.Misses``."""
    library = load()
    assert library is not None
    prefill, name = demands.prefill, NAMES[type(policy)]
    missed = np.empty(demands.ends.shape, np.int32)
    behind = np.empty(int(demands.counts[prefill].sum()), np.int32)
    parameters = np.array([getattr(policy, attribute) for attribute in PARAMETERS[name]], np.float64)
    error = library.tierlm_replay(
        name.encode(),
        *(array.ctypes for array in (parameters, demands.ids, demands.ends)),
        missed.size,
        prefill.ctypes,
        None if places is None else places.ctypes,
        demands.ends.shape[1],
        experts,
        policy.info.capacity,
        *(array.ctypes for array in (missed, behind)),
    )
    if error:
        raise RuntimeError("no slot is available: this is a bug in tierlm, or the tier has no slots")
    return missed, behind[: int(missed[prefill].sum())]


@cache
def load() -> ctypes.CDLL | None:
    """The library, or None if it was not built."""
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
