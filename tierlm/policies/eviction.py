"""The interface of eviction policies, which choose the victim. The engine and the simulator call the same objects.

A policy sees keys and events only. To add one, write a subclass of Policy and a line in POLICIES
(tierlm/policies/__init__.py). A class outside the tree needs no line: its name is ``"my.module:MyPolicy"``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tierlm.spec import Key

Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class TierInfo:
    """What a policy knows of its tier: ``layers`` run in a cycle, the tier has ``capacity`` slots, and ``size_of``
    gives the bytes of a record (by default all sizes are equal)."""

    layers: int
    capacity: int
    size_of: Callable[[Key], int] = lambda key: 1


class Policy(ABC):
    """The eviction order of one tier.

    The tier calls every method from one thread. When a layer runs, it reports the hits first (``on_hit``), then for
    each absent record asks ``victims`` and calls ``on_evict`` and ``on_insert``, and at last ``on_turn_end``. Keys are
    hashable and of the form (layer, ...).

    Parameters are keyword arguments of the constructor with defaults. ``tunable`` maps those that may be searched to
    their lowest and highest value; a parameter is an integer if both bounds are.
    """

    tunable: ClassVar[Bounds] = {}

    def __init__(self, info: TierInfo):
        self.info = info

    @abstractmethod
    def on_insert(self, key: Any, demanded: bool = True) -> None:
        """``key`` has got a slot; ``demanded`` is False for a prefetch or a warm-up."""

    @abstractmethod
    def on_hit(self, key: Any) -> None:
        """A layer demands ``key``, which has a slot."""

    @abstractmethod
    def on_evict(self, key: Any) -> None:
        """``key`` has lost its slot."""

    def on_discard(self, key: Any) -> None:
        """``key`` has lost its slot because its read failed or was cancelled."""
        self.on_evict(key)

    def on_turn_end(self, layer: int) -> None:
        """``layer`` has run. Prefetches for other layers meanwhile are not part of its turn."""

    def expect(self, key: Any, share: float) -> None:
        """In earlier runs, a ``share`` of the tokens used ``key``."""

    @abstractmethod
    def victims(self, incoming: Any = None) -> Iterator[Any]:
        """Keys that have a slot, the best victim first; ``incoming`` takes the victim's slot. The tier skips keys in
        use and takes one. It calls nothing else while it iterates. Iteration changes no state."""
