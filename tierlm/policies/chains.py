"""A policy for blocks of KV values, each of use only with the blocks before it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from tierlm.policies.eviction import Policy, TierInfo


class BlockKey(NamedTuple):
    """A block of tokens: its place in its chain, its name, and the name of the block before."""

    depth: int
    name: bytes
    parent: bytes


class Leaves(Policy):
    """Least recently used, of the blocks that no other resident block follows: a block is of no use without its parent,
    so a parent is worth as much as all that follow it."""

    def __init__(self, info: TierInfo):
        super().__init__(info)
        self._queue: OrderedDict[BlockKey, None] = OrderedDict()
        self._children = Counter[bytes]()

    def on_insert(self, key: BlockKey, demanded: bool = True) -> None:
        self._queue[key] = None
        self._children[key.parent] += 1

    def on_hit(self, key: BlockKey) -> None:
        self._queue.move_to_end(key)

    def on_evict(self, key: BlockKey) -> None:
        del self._queue[key]
        self._children[key.parent] -= 1
        if not self._children[key.parent]:
            del self._children[key.parent]

    def victims(self, incoming: BlockKey | None = None) -> Iterator[BlockKey]:
        """The leaves, then the others from the deepest."""
        parents = list[BlockKey]()
        for key in self._queue:
            if key.name in self._children:
                parents.append(key)
            else:
                yield key
        yield from sorted(parents, key=lambda key: -key.depth)
