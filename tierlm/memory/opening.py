"""Opens what serves a plan's records: the disk with its threads, the tiers above it, and the store of experts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tierlm.checkpoints.arriving import Arrivals, ArrivingReader
from tierlm.checkpoints.container import Container
from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache
from tierlm.checkpoints.mirrors import open_disks
from tierlm.checkpoints.reader import Reader, split
from tierlm.checkpoints.record import Record
from tierlm.checkpoints.staging import arriving_in
from tierlm.config import RuntimeOptions, format_size
from tierlm.errors import StorageError
from tierlm.files import Stamp, user_cache
from tierlm.memory.disk import Disk
from tierlm.memory.heat import Heat
from tierlm.memory.slots import Slot, allocate
from tierlm.memory.store import Store
from tierlm.memory.tiers import Source, Tier
from tierlm.memory.transfer import Transfer
from tierlm.planning.plan import Plan, TierPlan
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.lookahead import Lookahead
from tierlm.spec import ExpertKey, Key
from tierlm.timeline import Timeline

COPY_THREADS = 2  # for copies to vram
HOST = torch.device("cpu")

log = logging.getLogger(__name__)


class Records(Protocol):
    """The records to serve, such as a Catalog's. ``stamps``: of the files that must not have changed. ``layers``: one
    item each."""

    @property
    def checkpoint(self) -> Container: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def stamps(self) -> Mapping[Path, Stamp]: ...

    @property
    def layers(self) -> Sequence[object]: ...

    @property
    def fingerprint(self) -> str: ...

    def experts(self) -> Sequence[ExpertKey]: ...

    def record(self, key: Key) -> Record: ...

    def size(self, key: Key) -> int: ...


def open_disk(
    records: Records, options: RuntimeOptions, plan: Plan, timeline: Timeline | None = None
) -> tuple[Reader, DiskProfile, Transfer, list[str]]:
    """The reader, the profile of its disks, the transfer threads, and notes for ``Stats``; ``stop`` closes them."""
    mirrors = [Path(folder) for folder in options.mirrors]
    arriving = arriving_in(records.checkpoint.path)
    probe = options.probe if arriving is None else "off"  # its reads would wait
    reader, profile, notes = open_disks(
        records.files, mirrors, options.reader, probe, ProfileCache(user_cache()), records.stamps
    )
    try:
        if arriving is not None:
            arrivals = Arrivals(arriving)
            try:
                reader = ArrivingReader(reader, arrivals)
            except OSError as error:
                raise StorageError(str(error)) from error
            here, total = map(format_size, arrivals.progress)
            notes.append(f"weights: {here} of {total} were here at the start; the rest arrives from the Hub meanwhile")
        threads = options.transfer_threads or _transfer_threads(records, plan, profile)
        return reader, profile, Transfer(threads, timeline, profile.request_bytes), notes
    except BaseException:
        reader.close()
        raise


def stop(transfer: Transfer, reader: Reader) -> None:
    """Stop the threads and close the files. If a thread is stuck in a read, its files stay open."""
    if transfer.close():
        reader.close()


def tier_plans(plan: Plan, device: torch.device) -> list[tuple[str, TierPlan, torch.device]]:
    """Name, plan and device of each tier, lowest first."""
    return [("ram", plan.ram, HOST)] + ([] if plan.vram is None else [("vram", plan.vram, device)])


def expert_tiers(records: Records, policy: str, plan: Plan, disk: Disk, device: torch.device) -> tuple[Tier, ...]:
    """The tiers of the routed experts, the compute tier first."""
    size = max(map(records.size, records.experts()), default=0)
    return open_tiers(records, policy, plan, disk, device, lambda tier: [size] * tier.expert_slots)


def open_tiers(
    records: Records,
    policy: str,
    plan: Plan,
    disk: Disk,
    device: torch.device,
    sizes_in: Callable[[TierPlan], list[int]],
) -> tuple[Tier, ...]:
    """Tiers with slots of ``sizes_in``, the compute tier first."""
    tiers: list[Tier] = []
    for name, planned, place in tier_plans(plan, device):
        sizes = sizes_in(planned)
        info = TierInfo(len(records.layers), len(sizes), records.size)
        fits = policy == "default" and len(sizes) >= len(records.experts())  # no evictions, so nothing to learn
        source: Source = tiers[-1] if tiers else disk
        slots = _slots(sizes, place)
        tiers.append(
            Tier(name, slots, source, disk.transfer, make_policy("lru" if fits else policy, info), records.size)
        )
    return tuple(reversed(tiers))


def open_store(
    records: Records, options: RuntimeOptions, tier: Tier, lookahead: Lookahead
) -> tuple[Store, Path | None]:
    """The store of the experts in the compute tier ``tier``, whose slots it begins to fill or populate; and the file of
    their heat, None if heat is not saved."""
    cache = user_cache()
    heat_file = cache / "heat" / f"{records.fingerprint}.json" if options.heat and cache else None
    heat = Heat() if heat_file is None else Heat.read(heat_file, records.experts())
    log.info("heat of %d experts from %s", len(heat.uses), heat_file or "nowhere")
    store = Store(tier, records.record, lookahead, options.io_timeout, heat, options.exact)
    if options.heat and arriving_in(records.checkpoint.path) is None:  # else warm-up reads would wait
        hottest = heat.hottest()
        store.warm(hottest + sorted(set(records.experts()) - set(hottest)))
    tier.populate()
    return store, heat_file


def _transfer_threads(records: Records, plan: Plan, profile: DiskProfile) -> int:
    """Threads to read experts at the disk's full speed, plus those for copies to vram."""
    sizes = [profile.request_bytes]
    if experts := records.experts():
        extents = records.record(experts[0]).extents
        sizes = [part.hi - part.lo for extent in extents for part in split(extent, profile.request_bytes)]
    copying = 0 if plan.vram is None else COPY_THREADS
    return profile.depth_of(sum(sizes) // len(sizes)) + copying


def _slots(sizes: Sequence[int], device: torch.device) -> list[Slot]:
    """Adjacent slots of ``sizes`` in one slab."""
    slab: Tensor = allocate(sum(sizes), device)
    ends = itertools.accumulate(sizes)
    return [Slot(slab[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
