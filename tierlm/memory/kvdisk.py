"""The KV blocks on disk: which are there, which is written, which gives way."""

from __future__ import annotations

import heapq
import logging
import statistics
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tierlm.config import format_size
from tierlm.errors import UsageError
from tierlm.memory.kvblock import BlockLayout
from tierlm.memory.kvfiles import BlockFiles, Header
from tierlm.memory.kvmover import Buffer, Move, Mover
from tierlm.policies.chains import BlockKey
from tierlm.policies.eviction import Policy, TierInfo

STAGING = 64 * 2**20  # bytes of blocks on their way, at most, unless MIN_BUFFERS need more
MIN_BUFFERS, MAX_BUFFERS = 8, 32
FOR_READS = 4  # buffers that writes leave free
LEAVE = 5.0  # seconds that writes get when the model closes
MEASURED = 32  # reads whose median time counts

log = logging.getLogger(__name__)


@dataclass
class KvTier:
    """KV values of one tier. ``tokens``: held now. ``hit_tokens``, ``hit_bytes``: found there by prompts.

    Of the disk, in tokens: ``stored`` since the load; ``evicted``; ``dropped``, not stored, as blocks came faster than
    the disk takes them; ``damaged``, whose read failed; ``skipped``, computed again, as that was expected to be faster.
    """

    tokens: int = 0
    hit_tokens: int = 0
    hit_bytes: int = 0
    stored: int = 0
    evicted: int = 0
    dropped: int = 0
    damaged: int = 0
    skipped: int = 0


@dataclass(slots=True, eq=False)
class Entry:
    """A block that has a slot. ``writing``: until it is whole on disk. ``pins``: loads that need it. ``lost``: a read
    failed."""

    slot: int
    header: Header
    writing: bool = False
    pins: int = 0
    lost: bool = False


class KvDisk:
    """A store of KV blocks with ``slots`` slots. Used from the engine thread only, but for ``tier`` and ``troubles``;
    nothing waits for the disk but ``wait`` and ``close``.

    ``put`` copies a block and writes it in the background; at most ``buffers`` are on their way. A failed write ends
    all writing, and is told once; what was stored before can still be read. A failed or damaged read loses the block.

    ``policy``: who gives way. ``demands``: bytes of demands that wait for a disk. ``speed``: bytes a second of reads,
    until it is measured.
    """

    def __init__(
        self,
        files: BlockFiles,
        identity: bytes,
        layout: BlockLayout,
        slots: int,
        policy: Policy,
        demands: Callable[[], int],
        speed: float,
    ):
        self.identity, self.layout, self.tier = identity, layout, KvTier()
        self._files, self._policy = files, policy
        self._entries: dict[BlockKey, Entry] = {}
        self._serial = 0
        self._restore(files.found)
        taken = {entry.slot for entry in self._entries.values()}
        self._free = [slot for slot in range(slots) if slot not in taken]  # a heap
        self._buffers = [Buffer(layout.buffer) for _ in range(buffers_of(layout))]
        self._writes, self._unwanted = deque[Move](), list[Move]()
        self._times = deque[float]([layout.stored / speed], maxlen=MEASURED)
        self._trouble: str | None = None
        self._mover = Mover(files, layout, demands)

    def _restore(self, found: dict[int, Header]) -> None:
        """Take over what an earlier process has stored, but for blocks without their parents."""
        names = {self.identity}
        for slot, header in sorted(found.items(), key=lambda item: item[1].key.depth):
            if header.key.parent in names and header.key.name not in names:
                names.add(header.key.name)
                self._entries[header.key] = Entry(slot, header)
        for key, entry in sorted(self._entries.items(), key=lambda item: item[1].header.serial):
            self._policy.on_insert(key)
            self._serial = entry.header.serial
        self.tier.tokens = len(self._entries) * self.layout.tokens

    @property
    def speed(self) -> float:
        """Bytes a second of a read, by the median of the latest."""
        return self.layout.stored / max(statistics.median(self._times), 1e-9)

    @property
    def writable(self) -> bool:
        """Whether blocks are still stored."""
        return self._trouble is None

    def troubles(self) -> list[str]:
        """What a user should know."""
        lost = [f"{self.tier.damaged} tokens of KV values on disk were damaged"] * bool(self.tier.damaged)
        return ([] if self._trouble is None else [self._trouble]) + lost

    def find(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks from the start of a chain can be read. They count as used."""
        self.collect()
        count = 0
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.writing or entry.lost:
                break
            count += 1
        for key in reversed(keys[:count]):  # a parent was used after its child
            self._policy.on_hit(key)
        return count

    def put(self, key: BlockKey, rows: Sequence[Tensor], chain: Collection[BlockKey]) -> bool:
        """Begin to store a block, unless it is there. ``rows``: [tokens, width] of each layer. ``chain``: blocks that
        do not give way to it. False if it is not possible now."""
        if key in self._entries:
            return True
        if self._trouble is not None or len(self._buffers) <= FOR_READS:
            return False
        if not self._free and not self._evict(key, chain):
            return False
        buffer, slot = self._buffers.pop(), heapq.heappop(self._free)
        for part, values in zip(self.layout.rows(buffer.tensor), rows, strict=True):
            part.copy_(values)
        self._serial += 1
        header = Header(key, self._serial, 0)
        self._entries[key] = Entry(slot, header, writing=True)
        self._policy.on_insert(key)
        move = Move(slot, header, buffer, writes=True)
        self._writes.append(move)
        self._mover.submit(move)
        return True

    def pin(self, keys: Sequence[BlockKey]) -> None:
        """Keep blocks that ``find`` has counted until ``unpin``."""
        for key in keys:
            self._entries[key].pins += 1

    def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End ``pin``. Blocks that could not be read are gone now."""
        for key in keys:
            entry = self._entries[key]
            entry.pins -= 1
            if entry.lost and not entry.pins:
                self._forget(key)

    def read(self, key: BlockKey) -> Move | None:
        """Begin to read a pinned block; None if no buffer is free. ``release`` must follow."""
        if not self._buffers:
            return None
        entry = self._entries[key]
        move = Move(entry.slot, entry.header, self._buffers.pop(), writes=False)
        self._mover.submit(move)
        return move

    def wait(self, move: Move, timeout: float) -> None:
        """Return once ``move`` is done, or after ``timeout`` seconds."""
        self._mover.wait(move, timeout)

    def release(self, move: Move) -> None:
        """End a read, done or not."""
        if not move.done:
            self._unwanted.append(move)
            return
        self._buffers.append(move.buffer)
        if move.error is None:
            self._times.append(move.seconds)
            return
        entry = self._entries.get(move.header.key)
        if entry is not None and entry.header is move.header and not entry.lost:
            entry.lost = True
            self.tier.damaged += self.layout.tokens
            log.warning("KV block lost: %s", move.error)
            if not entry.pins:
                self._forget(move.header.key)

    def collect(self) -> None:
        """Take note of ended moves."""
        while self._writes and self._writes[0].done:
            move = self._writes.popleft()
            key, entry = move.header.key, self._entries[move.header.key]
            self._buffers.append(move.buffer)
            entry.writing, entry.header = False, move.header
            if move.error is None:
                self.tier.stored += self.layout.tokens
                self.tier.tokens += self.layout.tokens
                continue
            self.tier.dropped += self.layout.tokens
            self.tier.tokens += self.layout.tokens  # which _forget takes away
            self._forget(key)
            if isinstance(move.error, OSError) and self._trouble is None:
                reason = move.error.strerror or move.error
                self._trouble = f"kv_disk: no more KV values are stored, since a write failed: {reason}"
                log.warning("%s", self._trouble)
        unwanted, self._unwanted = self._unwanted, []
        for move in unwanted:
            self.release(move)

    def close(self) -> None:
        """Finish the writes and unlock the files. If the thread is stuck, they stay open."""
        if self._mover.close(LEAVE):
            self.collect()
            self._files.close()

    def _evict(self, incoming: BlockKey, chain: Collection[BlockKey]) -> bool:
        """Free a slot for ``incoming``. False if no block may give way."""
        for key in self._policy.victims(incoming):
            entry = self._entries[key]
            if not entry.writing and not entry.pins and key not in chain:
                self.tier.evicted += self.layout.tokens
                self._forget(key)
                return True
        return False

    def _forget(self, key: BlockKey) -> None:
        heapq.heappush(self._free, self._entries.pop(key).slot)
        self._policy.on_evict(key)
        self.tier.tokens -= self.layout.tokens

    def snapshot(self) -> KvTier:
        """The counters now, with the writes that have ended since. Any thread may read it."""
        ended = self.layout.tokens * sum(move.done and move.error is None for move in list(self._writes))
        return replace(self.tier, tokens=self.tier.tokens + ended, stored=self.tier.stored + ended)


def buffers_of(layout: BlockLayout) -> int:
    """Blocks that may be on their way at once."""
    return max(MIN_BUFFERS, min(MAX_BUFFERS, STAGING // layout.buffer))


def staging_of(layout: BlockLayout) -> int:
    """Bytes of memory that a store takes."""
    return layout.buffer * buffers_of(layout) + (0 if layout.format == "exact" else layout.stored)


def open_kv_disk(
    folder: Path,
    size: int,
    layout: BlockLayout,
    identity: bytes,
    policy: Callable[[TierInfo], Policy],
    demands: Callable[[], int],
    speed: float,
) -> KvDisk | str:
    """The store in ``folder`` of at most ``size`` bytes, or why there is none, in words. Raises UsageError if ``size``
    is too small, TierlmError without a thread."""
    slots = size // layout.stored
    if slots < MIN_BUFFERS:
        least = format_size(MIN_BUFFERS * layout.stored)
        raise UsageError(f"kv_disk: expected at least {least} for this model, found {format_size(size)}")
    try:
        files = BlockFiles(folder, identity, layout.stored, slots)
    except BlockingIOError:
        return f"kv_disk: {folder} is in use by another process, so no KV values are stored or found there"
    except OSError as error:
        return f"kv_disk: {folder}: no KV values are stored or found there: {error.strerror or error}"
    try:
        return KvDisk(files, identity, layout, slots, policy(TierInfo(1, slots)), demands, speed)
    except BaseException:
        files.close()
        raise
