"""A policy for blocks of KV values, each of use only with the blocks before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tierlm.policies.eviction import Policy, TierInfo
from tierlm.policies.queues import Arc


class BlockKey(NamedTuple):
    """A block of tokens: its place in its chain, its name, and the name of the block before."""

    depth: int
    name: bytes
    parent: bytes


class Leaves(Policy):
    """The order of another policy, but blocks that no resident block follows leave first: a block is of no use without
    its parent, so a parent is worth as much as all that follow it.

    ``order``: the other policy. Most prompts come once, and ARC lets them leave before those that came again.
    """

    def __init__(self, info: TierInfo, order: type[Policy] = Arc):
        super().__init__(info)
        self._order = order(info)
        self._children = Counter[bytes]()

    def on_insert(self, key: BlockKey, demanded: bool = True) -> None:
        self._order.on_insert(key, demanded)
        self._children[key.parent] += 1

    def on_hit(self, key: BlockKey) -> None:
        self._order.on_hit(key)

    def on_evict(self, key: BlockKey) -> None:
        self._order.on_evict(key)
        self._orphan(key)

    def on_discard(self, key: BlockKey) -> None:
        self._order.on_discard(key)
        self._orphan(key)

    def victims(self, incoming: BlockKey | None = None) -> Iterator[BlockKey]:
        parents = list[BlockKey]()
        for key in self._order.victims(incoming):
            if key.name in self._children:
                parents.append(key)
            else:
                yield key
        yield from sorted(parents, key=lambda key: -key.depth)

    def _orphan(self, key: BlockKey) -> None:
        """Its parent has one child less."""
        self._children[key.parent] -= 1
        if not self._children[key.parent]:
            del self._children[key.parent]
