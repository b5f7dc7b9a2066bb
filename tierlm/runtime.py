"""Builds the parts of a loaded model under a budget, and owns them: ids in, logits out."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tierlm.checkpoints.codec import load_zstandard
from tierlm.checkpoints.disk_profile import ProfileCache
from tierlm.checkpoints.formats import DTYPES, Weights, weights_of
from tierlm.checkpoints.mirrors import open_disks
from tierlm.checkpoints.reader import split
from tierlm.checkpoints.rows import Rows
from tierlm.config import DEFAULT_CONTEXT, Budget, RuntimeOptions, format_size
from tierlm.engine.generate import Engine
from tierlm.errors import BudgetError, UsageError
from tierlm.files import user_cache
from tierlm.host import available_ram, process_ram
from tierlm.kernels import native
from tierlm.memory.disk import Disk
from tierlm.memory.heat import Heat
from tierlm.memory.kvcache import KvCache
from tierlm.memory.pressure import Pressure
from tierlm.memory.slots import Slot, allocate, can_give_back
from tierlm.memory.store import Store
from tierlm.memory.ticket import DISK, Priority
from tierlm.memory.tiers import Source, Tier
from tierlm.memory.transfer import Transfer
from tierlm.memory.trunks import Trunks
from tierlm.models.catalog import Catalog
from tierlm.models.decoder import Decoder, Segment
from tierlm.models.moe import MixtureOfExperts
from tierlm.models.outline import sizes_of
from tierlm.models.router import Router
from tierlm.planning.plan import AUTO_RAM, Plan, TierPlan, make_plan
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.predictors import make_predictor
from tierlm.policies.recency import Lru
from tierlm.spec import ExpertKey, ResidentKey
from tierlm.timeline import Timeline
from tierlm.tracing.recorder import Recorder
from tierlm.tracing.trace import TraceInfo

COPY_THREADS = 2  # to vram
AUTO_VRAM = 0.9  # the share of what is free


@dataclass(frozen=True, slots=True)
class Meter:
    """Running totals: seconds waited for transfers, seconds in which the disk was busy, bytes read from it."""

    stall: float
    reading: float
    disk_bytes: int

    def __sub__(self, earlier: Meter) -> Meter:
        return Meter(self.stall - earlier.stall, self.reading - earlier.reading, self.disk_bytes - earlier.disk_bytes)


class Runtime:
    """One model under one budget. ``notes``: what the platform or the checkpoint made of the options.

    Made in this order: files, plan, tiers, model. Raises UsageError, BudgetError, CheckpointError, StorageError, and
    then leaves no thread running and no file open. ``progress`` is called with trunk bytes loaded, and in total.
    """

    def __init__(
        self, folder: Path, budget: Budget, options: RuntimeOptions, progress: Callable[[int, int], None] | None = None
    ):
        began = time.perf_counter()
        self.options, self.device = options, find_device(options.device)
        self.catalog = Catalog(folder)
        if self.catalog.compressed:
            load_zstandard()  # or say that it is missing before anything is loaded
        spec = self.catalog.spec
        if options.context is not None and options.context > spec.max_position:
            raise UsageError(f"context: expected at most the model's own {spec.max_position}, found {options.context}")
        self.context = options.context or min(spec.max_position, DEFAULT_CONTEXT)
        self.predictor = make_predictor(options.predictor, spec.experts_per_token)
        make_policy(options.policy, TierInfo(len(spec.layers), 1))  # a wrong name is told before anything is loaded
        self.plan = self._plan(budget)
        mirrors = [Path(folder) for folder in options.mirrors]
        self.reader, self.disk_profile, disks = open_disks(
            self.catalog.files, mirrors, options.reader, options.probe, ProfileCache(user_cache())
        )
        cache = user_cache()
        self._heat_file = cache / "heat" / f"{self.catalog.fingerprint}.json" if options.heat and cache else None
        self.heat = Heat() if self._heat_file is None else Heat.read(self._heat_file, self.catalog.experts())
        for name, file in (("timeline", options.timeline), ("trace", options.trace)):
            if file is not None and not Path(file).absolute().parent.is_dir():
                raise UsageError(f"{name}: {Path(file).absolute().parent}: no such folder")
        self.timeline = None if options.timeline is None else Timeline()
        threads = options.transfer_threads or self._transfer_threads()
        self.transfer = Transfer(threads, self.timeline, self.disk_profile.request_bytes)
        self.recorder: Recorder | None = None
        self._notes = [*disks, *self._platform_notes()]
        try:
            self._build(progress or (lambda done, total: None))
        except BaseException:
            self.close()
            raise
        self.pressure: Pressure | None = None  # --ram auto was chosen for what was free, which others may come to need
        if budget.ram is None and can_give_back():
            self.pressure = Pressure(reserve=int(self.ram_budget * (1 - AUTO_RAM) / AUTO_RAM))
        self._shrunk = self._regrown = 0
        self.load_seconds = time.perf_counter() - began

    @property
    def notes(self) -> list[str]:
        followed = []
        if self._shrunk:
            what = f"{format_size(self._shrunk)} of slots given up, {format_size(self._regrown)} taken back"
            followed.append(f"this machine was short of memory: {what}")
        return self._notes + self.reader.troubles() + followed

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after every token, float32 [T, vocab]. Raises PromptError, and BudgetError for too large a result."""
        per_token = self.catalog.spec.vocab * 4
        room = self.ram_budget - sum(self.plan.ram.parts.values()) + self.plan.ram.parts["logits"]
        if len(ids) * per_token > room:
            raise BudgetError(
                f"the logits of {len(ids)} tokens take {format_size(len(ids) * per_token)}, of the ram budget "
                f"{format_size(room)} are left: ask for at most {room // per_token} tokens at a time",
                floor=self.ram_budget - room + len(ids) * per_token,
                given=self.ram_budget,
                dominant="logits",
            )
        self.cache.clear()
        span = self.cache.reserve(len(ids))
        out = torch.empty(len(ids), self.catalog.spec.vocab)
        for start in range(0, len(ids), self.options.prefill_chunk):
            step = Segment(ids[start : start + self.options.prefill_chunk], span)
            self.decoder.forward([step], prefill=True, out=out[start : start + len(step.ids)])
        return out

    def meter(self) -> Meter:
        """What has been waited for and read so far."""
        disk = self.transfer.busy()[DISK]
        return Meter(self.store.stall + self.trunks.stall, disk.seconds, disk.bytes)

    def follow_pressure(self) -> None:
        """Between two steps: give memory of expert slots back if others need it, or take it again."""
        if self.pressure is None:
            return
        tier = self.experts[-1]  # of ram
        change = self.pressure.change(sum(slot.size for slot in tier.slots if slot.filled))
        if change < 0:
            self._shrunk += tier.shrink(-change, self.catalog.spec.experts_per_token)
        elif change > 0 and tier.retired:
            self._regrown += tier.grow(change)

    def close(self) -> None:
        """Stop the threads and close the files; keep what is to be kept. A thread that is stuck in a read keeps its
        file."""
        if self.transfer.close():
            self.reader.close()
        try:
            if self._heat_file is not None and self.heat.uses:
                self.heat.write(self._heat_file)
            if self.recorder is not None:
                self.recorder.close()
            if self.timeline is not None and self.options.timeline is not None:
                self.timeline.write(Path(self.options.timeline))
        except OSError as error:
            warnings.warn(f"not written: {error.filename}: {error.strerror}", stacklevel=2)

    def _plan(self, budget: Budget) -> Plan:
        options = self.options
        kv_item = 4 if options.kv_dtype == "float32" else 2
        sizes = sizes_of(self.catalog, self.context, options.prefill_chunk, kv_item)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own memory is there before it is counted
        held = process_ram()
        self.ram_budget = int((available_ram() + held) * AUTO_RAM) if budget.ram is None else budget.ram
        vram = budget.vram
        if vram is None and self.device.type != "cpu":
            vram = int(torch.get_device_module(self.device).mem_get_info(self.device)[0] * AUTO_VRAM)
        return make_plan(
            sizes,
            ram=self.ram_budget,
            vram=vram,
            process=held,
            min_slots=self.catalog.spec.experts_per_token,
            ram_slots=options.ram_slots,
            vram_slots=options.vram_slots,
            resident_trunks=options.resident_trunks,
        )

    def _transfer_threads(self) -> int:
        """Enough to read this model's experts as fast as the disk goes, and to copy to vram meanwhile."""
        sizes = [self.disk_profile.request_bytes]
        if experts := self.catalog.experts():
            extents = self.catalog.record(experts[0]).extents
            sizes = [part.hi - part.lo for extent in extents for part in split(extent, self.disk_profile.request_bytes)]
        copying = 0 if self.plan.vram is None else COPY_THREADS
        return self.disk_profile.depth_of(sum(sizes) // len(sizes)) + copying

    def _platform_notes(self) -> list[str]:
        notes = []
        if self.catalog.ignored:
            notes.append(f"{len(self.catalog.ignored)} tensors of multi-token prediction layers are not used")
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
            notes.append("torch was imported before tierlm: its idle threads spin on cores that reads need")
        if native.load() is None:
            what = "the compiled kernels and reads were not built (no C++ compiler)"
            notes.append(f"{what}: torch and Python do their work, more slowly")
        if self.plan.vram is not None and self.device.type == "cpu":
            notes.append("no accelerator: vram is a second slab of host memory, beside the ram budget")
        return notes

    def _build(self, progress: Callable[[int, int], None]) -> None:
        catalog, plan, options, spec = self.catalog, self.plan, self.options, self.catalog.spec
        disk = Disk(self.reader, catalog.record, self.transfer, self.disk_profile.request_bytes)
        resident = self._load_resident(disk)
        self._rows = Rows(catalog.embedding, catalog.seals_of(catalog.embedding))
        host = torch.device("cpu")
        self.experts = [self._expert_tier("ram", plan.ram, disk, host)]
        trunk_tiers = [self._trunk_tier("ram", plan.ram, disk, host)]
        shared = catalog.trunks, catalog.record, options.io_timeout, options.exact
        trunks = [Trunks(trunk_tiers[0], plan.ram.trunk, *shared)]
        if plan.vram is not None:
            self.experts.insert(0, self._expert_tier("vram", plan.vram, self.experts[0], self.device))
            trunk_tiers.insert(0, self._trunk_tier("vram", plan.vram, trunk_tiers[0], self.device))
            trunks.insert(0, Trunks(trunk_tiers[0], plan.vram.trunk, *shared))
        self.trunk_tiers = trunk_tiers
        total = sum(catalog.size(key) for part in (plan.ram, plan.vram) if part is not None for key in part.trunk)
        done = 0
        for level in reversed(trunks):
            for size in level.load():
                done += size
                progress(done, total)
        self.trunks = trunks[0]
        self.store = Store(self.experts[0], catalog.record, options.io_timeout, self.heat, options.exact)
        if options.heat:
            hottest = self.heat.hottest()
            self.store.warm(hottest + sorted(set(catalog.experts()) - set(hottest)))
        kv_dtype = torch.float32 if options.kv_dtype == "float32" else torch.bfloat16
        widths = [layer.attention.cache_width for layer in spec.layers]
        self.cache = KvCache(widths, self.context, kv_dtype, self.device)
        if options.trace is not None:
            self.recorder = self._open_recorder(Path(options.trace))
        moe = MixtureOfExperts(spec, Router(spec, resident), self.store, self.predictor, self.timeline, self.recorder)
        self.decoder = Decoder(
            spec, self._embed, resident, self.trunks, catalog.head, self.cache, moe, self.device, self.timeline
        )
        self.engine = Engine(self.decoder, self.cache, catalog.eos, options.prefill_chunk)

    def _expert_tier(self, name: str, plan: TierPlan, source: Source, device: torch.device) -> Tier:
        size = max((self.catalog.size(key) for key in self.catalog.experts()), default=0)
        slots = _cut(allocate(plan.expert_slots * size, device), [size] * plan.expert_slots)
        everything = plan.expert_slots >= len(self.catalog.experts())
        policy_name = self.options.policy
        if everything and policy_name == "default":  # nothing has to leave, so nothing need be learnt
            policy_name = "lru"
        policy = make_policy(policy_name, TierInfo(len(self.catalog.spec.layers), plan.expert_slots, self.catalog.size))
        return Tier(name, slots, source, self.transfer, policy, self.catalog.size)

    def _trunk_tier(self, name: str, plan: TierPlan, source: Source, device: torch.device) -> Tier:
        sizes = [self.catalog.size(key) for key in plan.trunk] + [plan.ring, plan.ring] * bool(plan.ring)
        policy = Lru(TierInfo(len(self.catalog.spec.layers), len(sizes), self.catalog.size))
        return Tier(name, _cut(allocate(sum(sizes), device), sizes), source, self.transfer, policy, self.catalog.size)

    def _open_recorder(self, file: Path) -> Recorder:
        """Of a trace, with the order in which a prefill reads. Raises UsageError."""
        catalog, spec = self.catalog, self.catalog.spec
        layers = [[ExpertKey(layer, expert) for expert in range(spec.experts)] for layer in spec.moe_layers]
        order = tuple(tuple(key.expert for key in self.store.in_order(keys)) for keys in layers)
        size = max(catalog.size(key) for key in catalog.experts())
        name = catalog.checkpoint.folder.resolve().name
        info = TraceInfo(name, len(spec.layers), spec.moe_layers, spec.experts, size, order)
        try:
            return Recorder(file, info, spec.experts_per_token, self.options.trace_scores)
        except OSError as error:
            raise UsageError(f"trace: {file}: cannot be written: {error.strerror}") from error

    def _load_resident(self, disk: Disk) -> Weights:
        slot = Slot(allocate(self.catalog.size(ResidentKey()), torch.device("cpu")))
        ticket, _ = disk.fetch(ResidentKey(), slot, Priority.DEMAND, streaming=False)
        self.transfer.wait_any([ticket], self.options.io_timeout)
        if ticket.error is not None:
            raise ticket.error
        return weights_of(slot.buffer.to(self.device), self.catalog.record(ResidentKey()))

    def _embed(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of some tokens, float32 [T, hidden], read row by row: the table itself is never loaded."""
        table = self.catalog.embedding
        rows = torch.frombuffer(bytearray(self._rows.read(ids)), dtype=DTYPES[table.dtype])
        return rows.view(len(ids), -1).to(self.device, torch.float32)


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is the accelerator where there is one. Raises UsageError."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from error
    if device.type == "meta":
        raise UsageError("device 'meta' holds no data")
    return device


def _cut(slab: Tensor, sizes: Sequence[int]) -> list[Slot]:
    """Slots of some sizes, one behind the other."""
    ends = list(itertools.accumulate(sizes))
    return [Slot(slab[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
