"""What an eviction policy is: which resident record leaves. Pure Python; the runtime and the simulator call the same
objects.

A policy sees keys and events only. To add one: a class with the methods of Policy, and a line in POLICIES
(tierlm/policies/__init__.py), or no line at all: a name such as ``"my.module:MyPolicy"`` is looked up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tierlm.spec import Key

Bounds = Mapping[str, tuple[float, float]]


def _alike(key: Key) -> int:
    return 1


@dataclass(frozen=True)
class TierInfo:
    """What a policy knows beforehand of its tier: ``layers`` run in a cycle, there are ``capacity`` slots, and
    ``size_of`` gives the bytes of a record (by default, all are alike)."""

    layers: int
    capacity: int
    size_of: Callable[[Key], int] = _alike


class Policy(ABC):
    """One tier's order of eviction.

    The tier calls, from one thread: ``on_insert`` when a record is given a slot, ``on_hit`` when a record that has one
    is demanded, ``on_evict`` when the tier has taken a record's slot away, ``on_discard`` when a record is gone
    because its read failed. Keys are of the form (layer, ...), and hashable. When a layer runs, the tier reports the
    hits first; then each absent record: a look at ``victims``, ``on_evict``, ``on_insert``; then ``on_turn_end``.

    Parameters are keyword arguments of the constructor with defaults; ``tunable`` gives those that may be searched,
    with the lowest and highest value: integers where both are integers.
    """

    tunable: ClassVar[Bounds] = {}

    def __init__(self, info: TierInfo):
        self.info = info

    @abstractmethod
    def on_insert(self, key: Any, demanded: bool = True) -> None:
        """``key`` has been given a slot; ``demanded`` is False if only a predictor asked for it."""

    @abstractmethod
    def on_hit(self, key: Any) -> None:
        """``key``, which has a slot, is demanded."""

    @abstractmethod
    def on_evict(self, key: Any) -> None:
        """``key`` has lost its slot."""

    def on_discard(self, key: Any) -> None:
        """``key`` never arrived."""
        self.on_evict(key)

    def on_turn_end(self, layer: int) -> None:
        """``layer`` has demanded all that it needs for this step; what is prefetched meanwhile for others is no part
        of its turn."""

    def expect(self, key: Any, share: float) -> None:
        """In earlier runs, ``share`` of the tokens used ``key``."""

    @abstractmethod
    def victims(self, incoming: Any = None) -> Iterator[Any]:
        """Keys that have a slot, the best victim first; ``incoming`` is for whom. The tier skips those in use, and
        takes one; nothing may be called on the policy while it looks. A look changes nothing."""
