"""Which records have a slot: what memory/tiers.py decides, without bytes, threads or time."""

from __future__ import annotations

from collections.abc import Iterable

from tierlm.policies.eviction import Policy
from tierlm.spec import ExpertKey


class Residency:
    """One tier's slots, all of one size, and the same policy object that a tier has.

    The verbs and their order are those of ``memory.tiers.Tier``, so that a policy sees the same events: ``demand``,
    ``start``, ``arrived``, ``release``, ``protect``, ``drop_stale``. tests/test_replay.py holds the two together.
    """

    def __init__(self, policy: Policy, slots: int):
        self.policy, self.slots = policy, slots
        self.resident: dict[ExpertKey, None] = {}  # on their way too, in the order in which they were started
        self.guessed: set[ExpertKey] = set()  # that nobody has demanded yet
        self.loading: set[ExpertKey] = set()
        self.wasted = self.useful = 0
        self._pinned: set[ExpertKey] = set()
        self._streaming: set[ExpertKey] = set()  # streamed through by a prefill, in the place of a warm record
        self._leaving: dict[ExpertKey, None] = {}
        self._kept: frozenset[ExpertKey] = frozenset()
        self._guess_limit, self._streaming_limit = slots // 8, max(2, slots // 8)

    def demand(self, key: ExpertKey, streaming: bool) -> bool:
        """Pin ``key`` and tell the policy of the hit. False: it is absent and must be started."""
        if key not in self.resident:
            return False
        if self.guessed and key in self.guessed:
            self.guessed.remove(key)
            self.useful += 1
        if self._streaming and not streaming:
            self._streaming.discard(key)
        if self._leaving:
            self._leaving.pop(key, None)
        self.policy.on_hit(key)
        self._pinned.add(key)
        return True

    def start(self, key: ExpertKey, streaming: bool, *, guess: bool = False) -> bool:
        """Give ``key``, which is absent, a slot, pinned unless it is a guess; what has to leave for it does. False:
        no slot can be had now. It counts as there, unless the caller puts it into ``loading``."""
        displacing = False
        if len(self.resident) >= self.slots:
            victim, displacing = self._victim(key, streaming, guess)
            if victim is None:
                return False
            self._forget(victim)
            self.policy.on_evict(victim)
        self.resident[key] = None
        if streaming and displacing:
            self._streaming.add(key)
        self.policy.on_insert(key, demanded=not guess)
        (self.guessed if guess else self._pinned).add(key)
        return True

    def release(self, key: ExpertKey) -> None:
        """The layer that demanded ``key`` is through with it."""
        self._pinned.discard(key)
        if key in self._streaming:
            self._leaving[key] = None

    def release_all(self) -> None:
        """Release what is pinned, all at once, where nothing of it is streaming: after a layer of a decode step."""
        self._pinned.clear()

    def protect(self, keys: Iterable[ExpertKey]) -> None:
        """Spare ``keys`` while others can leave instead."""
        self._kept = frozenset(keys)

    def discard(self, key: ExpertKey) -> None:
        """The read of ``key``, a guess, was dropped before it began."""
        self.guessed.discard(key)
        self.loading.discard(key)
        self._forget(key)
        self.policy.on_discard(key)

    def waste(self, key: ExpertKey) -> None:
        """The guess of ``key`` was wrong: it leaves first."""
        self.guessed.discard(key)
        self.wasted += 1
        self._leaving[key] = None

    def _victim(self, key: ExpertKey, streaming: bool, guess: bool) -> tuple[ExpertKey | None, bool]:
        """Who leaves for ``key``, and whether a warm record has left or leaves for it: as Tier._find_slot."""
        pinned, loading = self._pinned, self.loading
        if guess and streaming and len(self.guessed & self._streaming) >= self._streaming_limit // 2:
            return None, False
        for candidate in self._leaving:
            if candidate not in pinned and candidate not in loading:
                return candidate, candidate in self._streaming
        if guess and len(self.guessed) >= self._guess_limit:
            return None, False
        if streaming and len(self._streaming) >= self._streaming_limit:
            ahead = [] if guess else [k for k in self.resident if k in self.guessed and k in self._streaming]
            return next((k for k in ahead if k not in pinned and k not in loading), None), True
        spared: ExpertKey | None = None
        for candidate in self.policy.victims(key):
            if candidate in pinned or candidate in loading or (guess and candidate.layer == key.layer):
                continue
            if candidate not in self._kept:
                return candidate, True
            spared = spared or candidate
        return (None, False) if guess else (spared, True)

    def _forget(self, key: ExpertKey) -> None:
        del self.resident[key]
        self._leaving.pop(key, None)
        self._streaming.discard(key)
        if key in self.guessed:
            self.guessed.remove(key)
            self.wasted += 1
