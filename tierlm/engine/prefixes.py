"""KV values that sequences leave in the cache for later ones whose prompts begin with the same ids."""

from __future__ import annotations

import bisect
import weakref
from collections import abc
from dataclasses import dataclass, replace

from tierlm.engine.sequence import Keep, Sequence
from tierlm.memory.kvcache import KvCache, Span
from tierlm.memory.kvdisk import KvTier


@dataclass(slots=True, eq=False)
class Kept:
    """KV values of ``span.length`` tokens, those of ``ids``, for sequences with ``owner``."""

    owner: weakref.ref[Keep]
    ids: list[int]
    span: Span


class Prefixes:
    """The spans of ended sequences.

    A sequence goes on from the values of its ``keep`` with the most tokens of its prompt, whether they are kept or of a
    sequence that runs. It takes a kept span over if its prompt begins with all of it, and copies a part otherwise. A
    state cannot be cut: with states, only whole spans are taken over.

    Kept spans give way to sequences that wait for room, the longest idle first. A span that is to be copied is cut and
    taken over instead if it is the next to give way, or if there is no room for both and it loses the smaller part.
    Those that give way to a sequence that grows lose their ends first.
    """

    def __init__(self, cache: KvCache):
        self.cache = cache
        self._kept: list[Kept] = []  # the longest idle first
        self._tier = KvTier()

    def snapshot(self) -> KvTier:
        """The counters now. Any thread may read it."""
        return replace(self._tier, tokens=self.cache.usage[0])

    def keep(self, sequence: Sequence) -> None:
        """Keep the span of an ended sequence for others with its ``keep``, if any; otherwise release it."""
        span, ids = sequence.span, sequence.computed
        assert span is not None
        if sequence.keep is None or not ids:
            self.cache.release(span)
            return
        for old in self._of(sequence.keep):
            if old.ids == (ids[: len(old.ids)] if self.cache.can_cut else ids):
                self._drop(old)  # nothing is lost
        self.cache.resize(span, span.length)
        self._kept.append(Kept(weakref.ref(sequence.keep), ids, span))

    def reserve(self, sequence: Sequence, running: abc.Iterable[Sequence]) -> Span | None:
        """A span for ``sequence``, with the values of its prompt that are there; None if there is no room."""
        for kept in [kept for kept in self._kept if kept.owner() is None]:
            self._drop(kept)
        if not self.cache.can_reserve(sequence.capacity, *(kept.span for kept in self._kept)):
            return None
        source, known = self._longest(sequence, running)
        lost = 0 if source is None else len(source.ids) - known
        own = source if source in self._kept and not lost else None  # it is taken over
        while not self.cache.can_reserve(sequence.capacity, *([] if own is None else [own.span])):
            if own is None and source in self._kept and (lost <= known or source is self._kept[0]):
                own = source
            else:
                self._drop(next(kept for kept in self._kept if kept is not source))
        self._tier.hit_tokens += known
        self._tier.hit_bytes += known * self.cache.token_bytes
        if own is not None:
            self._kept.remove(own)
            own.span.length = known
            self.cache.resize(own.span, sequence.capacity)
            return own.span
        span = self.cache.reserve(sequence.capacity)
        if source is not None:
            self.cache.copy(source.span, span, known)
        return span

    def fits(self, tokens: int, *instead_of: Span) -> bool:
        """Whether ``tokens`` are free, or would be without what is kept and without the spans ``instead_of``."""
        return self.cache.can_reserve(tokens, *(kept.span for kept in self._kept), *instead_of)

    def grow(self, span: Span, tokens: int) -> bool:
        """Add ``tokens`` to the capacity of ``span``, or as many as there are. False if there are none."""
        while (missing := tokens - self.cache.free) > 0 and self._kept:
            oldest = self._kept[0]
            if self.cache.can_cut and missing < len(oldest.ids):
                self._cut(oldest, len(oldest.ids) - missing)
            else:
                self._drop(oldest)
        found = min(tokens, self.cache.free)
        if found:
            self.cache.resize(span, span.capacity + found)
        return found > 0

    def coming(self, sequence: Sequence, running: abc.Iterable[Sequence]) -> tuple[int, int]:
        """Tokens of its prompt that are not there yet, and that a running sequence with its ``keep`` will compute; and
        how many it will then have to compute itself, besides the last one."""
        if sequence.keep is None or not self.cache.can_cut:
            return 0, len(sequence.prompt) - 1
        others, prompt = [other for other in running if other.keep is sequence.keep], sequence.prompt[:-1]
        shared = max((common(other.prompt, prompt) for other in others), default=0)
        return shared - self._longest(sequence, others)[1], len(prompt) - shared

    def _longest(self, sequence: Sequence, running: abc.Iterable[Sequence]) -> tuple[Kept | None, int]:
        """The values with the most tokens of the prompt, and how many. The last token runs: its logits are needed."""
        found: Kept | None = None
        if (keep := sequence.keep) is None:
            return None, 0
        live = [
            Kept(weakref.ref(keep), other.computed, other.span)
            for other in running
            if other.keep is keep and other.span is not None and self.cache.can_cut
        ]
        most, prompt = 0, sequence.tokens[:-1]
        for one in [*live, *self._of(keep)]:
            known = common(one.ids, prompt)
            if known and known >= most and (self.cache.can_cut or known == len(one.ids)):
                found, most = one, known
        return found, most

    def _of(self, keep: Keep) -> list[Kept]:
        return [kept for kept in self._kept if kept.owner() is keep]

    def _cut(self, kept: Kept, length: int) -> None:
        kept.span.length = length
        self.cache.resize(kept.span, length)
        del kept.ids[length:]

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self.cache.release(kept.span)


def common(one: abc.Sequence[int], other: abc.Sequence[int]) -> int:
    """The number of ids that both begin with."""
    most = min(len(one), len(other))
    return bisect.bisect_left(range(most), True, key=lambda last: one[: last + 1] != other[: last + 1])
