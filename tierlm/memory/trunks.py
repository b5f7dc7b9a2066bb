"""The decoder's view of the trunks: some are resident, the others stream through a ring of two slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tierlm.checkpoints.record import Record
from tierlm.checkpoints.views import Weights
from tierlm.memory.slots import Entry
from tierlm.memory.tiers import Tier
from tierlm.policies.residency import Purpose
from tierlm.spec import Key, UnitKey


class Trunks:
    """``order``: all trunks in cyclic execution order. ``exact``: see kernels.Weight."""

    def __init__(
        self,
        tier: Tier,
        resident: Sequence[UnitKey],
        order: Sequence[UnitKey],
        records: Callable[[Key], Record],
        io_timeout: float,
        exact: bool = False,
    ):
        self.tier, self.records, self.io_timeout, self.exact = tier, records, io_timeout, exact
        self._resident = resident
        self._next = dict(zip(order, [*order[1:], order[0]], strict=True))
        self._leased: Entry | None = None
        tier.residency.prefetch_limit = max(tier.residency.prefetch_limit, 1)  # the next trunk is known

    def load(self) -> Iterator[int]:
        """Load the resident trunks, largest first; yields the bytes of each when it has arrived."""
        for key in sorted(self._resident, key=lambda key: -self.tier.size_of(key)):
            entry = self._bring(key)
            yield entry.slot.size

    def get(self, key: UnitKey) -> Weights:
        """The weights of ``key``, valid until the next call. Prefetches the trunk that runs after it.

        Raises StorageError.
        """
        if self._leased is not None:
            self.tier.unpin(self._leased)
            self._leased = None
        self._leased = self._bring(key)
        follower = self._next[key]
        if follower not in self.tier.entries:
            self.tier.start(follower, purpose=Purpose.PREFETCH)
        return self._leased.slot.weights(self.records(key), self.exact)

    def _bring(self, key: UnitKey) -> Entry:
        """The entry of ``key``, resident and pinned."""
        entry = self.tier.demand(key)
        while entry is None:
            entry = self.tier.start(key)
            if entry is None:
                self.tier.wait([], self.io_timeout)
        try:
            while entry.ticket is not None:
                self.tier.wait([entry], self.io_timeout)
            if entry.error is not None:
                raise entry.error
        except BaseException:
            self.tier.unpin(entry)
            raise
        return entry
