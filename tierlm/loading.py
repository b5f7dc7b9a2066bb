"""Loads a model under a budget: checks everything, then opens it. An error leaves nothing open."""

from __future__ import annotations

import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tierlm.checkpoints.arriving import Arrivals, ArrivingReader, arriving_in
from tierlm.checkpoints.codec import load_zstandard
from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache
from tierlm.checkpoints.mirrors import open_disks
from tierlm.checkpoints.reader import Reader, split
from tierlm.checkpoints.rows import Rows
from tierlm.checkpoints.views import Weights, weights_of
from tierlm.config import DEFAULT_CONTEXT, Budget, RuntimeOptions, format_size
from tierlm.engine.scheduler import Scheduler
from tierlm.errors import BudgetError, StorageError, UsageError
from tierlm.files import user_cache
from tierlm.host import available_ram, process_ram, total_ram
from tierlm.kernels import native
from tierlm.memory.disk import Disk
from tierlm.memory.heat import Heat
from tierlm.memory.kvcache import KvCache
from tierlm.memory.meter import Meter
from tierlm.memory.pressure import Pressure, PressureRelief
from tierlm.memory.slots import Slot, allocate, can_decommit
from tierlm.memory.store import Store
from tierlm.memory.ticket import Priority
from tierlm.memory.tiers import Source, Tier
from tierlm.memory.transfer import Transfer
from tierlm.memory.trunks import Trunks
from tierlm.models.catalog import Catalog
from tierlm.models.decoder import Decoder
from tierlm.models.embedding import Embedding
from tierlm.models.moe import MixtureOfExperts
from tierlm.models.outline import sizes_of
from tierlm.models.router import Router
from tierlm.planning.plan import AUTO_RAM, SLACK, Plan, TierPlan, make_plan
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.prediction import Predictor
from tierlm.policies.predictors import make_predictor
from tierlm.runtime import Runtime
from tierlm.spec import ExpertKey, ResidentKey
from tierlm.timeline import Timeline
from tierlm.tracing.recorder import Recorder
from tierlm.tracing.trace import TraceInfo

COPY_THREADS = 2  # for copies to vram
AUTO_VRAM = 0.9  # share of the free memory
KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOST = torch.device("cpu")

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """A checked load: everything known without opening or allocating anything."""

    catalog: Catalog
    options: RuntimeOptions
    device: torch.device
    context: int
    predictor: Predictor
    plan: Plan
    ram_budget: int
    auto: bool  # the ram budget was derived from the free memory


def load_runtime(folder: Path, budget: Budget, options: RuntimeOptions, progress: Progress, others: int = 0) -> Runtime:
    """The runtime of the model in ``folder``, with its resident trunks loaded. It belongs to the calling thread.

    ``progress`` is called with the trunk bytes loaded so far and in total; it may raise to stop the load. ``others``:
    bytes of ram held by other models of this process. Raises UsageError, BudgetError, CheckpointError, StorageError;
    after an error no thread runs and no file is open.
    """
    began = time.perf_counter()
    request = _check(folder, budget, options, others)
    catalog, plan, spec = request.catalog, request.plan, request.catalog.spec
    _log_plan(request)
    with ExitStack() as undo:
        timeline = None if options.timeline is None else Timeline()
        recorder = None if options.trace is None else _open_recorder(Path(options.trace), request)
        if recorder is not None:
            undo.callback(recorder.drop)
        reader, profile, transfer, notes = _open_disk(request, timeline)
        undo.callback(_stop, transfer, reader)
        notes += _platform_notes(request)
        for note in notes:
            log.info("%s", note)
        cache = user_cache()
        heat_file = cache / "heat" / f"{catalog.fingerprint}.json" if options.heat and cache else None
        heat = Heat() if heat_file is None else Heat.read(heat_file, catalog.experts())
        disk = Disk(reader, catalog.record, transfer, profile.request_bytes)
        log.info("heat of %d experts from %s", len(heat.uses), heat_file or "nowhere")
        resident = _load_resident(request, disk, transfer)
        experts, trunk_tiers = _expert_tiers(request, disk, transfer), _trunk_tiers(request, disk, transfer)
        trunks = _load_trunks(request, trunk_tiers, progress)
        lookahead = Lookahead(request.predictor, spec.moe_layers)
        store = Store(experts[0], catalog.record, lookahead, options.io_timeout, heat, options.exact)
        if options.heat and arriving_in(catalog.checkpoint.path) is None:  # else warm-up reads would wait
            hottest = heat.hottest()
            store.warm(hottest + sorted(set(catalog.experts()) - set(hottest)))
        widths = [layer.attention.cache_width for layer in spec.layers]
        kv = KvCache(widths, request.context, KV_DTYPES[options.kv_dtype], request.device, spec.state_widths)
        embedded = catalog.embedding
        rows = Rows(embedded, catalog.seals_of(embedded), catalog.stamps.get(embedded.file), reader)
        undo.callback(rows.close)
        moe = MixtureOfExperts(spec, Router(spec, resident), store, timeline, recorder)
        embedding = Embedding(rows, embedded, request.device)
        decoder = Decoder(spec, embedding, resident, trunks, catalog.head, kv, moe, request.device, timeline)
        relief = _relief(request, experts[-1])
        meter = Meter(store, trunks, transfer)
        runtime = Runtime(
            catalog=catalog,
            options=options,
            device=request.device,
            context=request.context,
            plan=plan,
            ram_budget=request.ram_budget,
            reader=reader,
            disk_profile=profile,
            transfer=transfer,
            experts=experts,
            trunk_tiers=trunk_tiers,
            store=store,
            decoder=decoder,
            scheduler=Scheduler(decoder, kv, meter, relief, catalog.eos, options.prefill_chunk),
            heat=heat,
            heat_file=heat_file,
            recorder=recorder,
            timeline=timeline,
            relief=relief,
            loading_notes=tuple(notes),
            load_seconds=time.perf_counter() - began,
        )
        undo.pop_all()
    log.info("loaded in %.2f s", runtime.load_seconds)
    return runtime


def find_device(name: str) -> torch.device:
    """The device ``name``; "auto" is the accelerator, or the CPU without one. Raises UsageError."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or HOST
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UsageError("device 'meta' holds no data")
    return device


def _check(folder: Path, budget: Budget, options: RuntimeOptions, others: int) -> Request:
    """Check a load before anything is opened."""
    device, catalog = find_device(options.device), Catalog(folder)
    spec = catalog.spec
    if catalog.compressed:
        load_zstandard()
    if options.context is not None and options.context > spec.longest:
        raise UsageError(f"context: expected at most {spec.bound}, found {options.context}")
    context = options.context or min(spec.longest, DEFAULT_CONTEXT)
    predictor = make_predictor(options.predictor, spec.experts_per_token)
    make_policy(options.policy, TierInfo(len(spec.layers), 1))
    for name, file in (("timeline", options.timeline), ("trace", options.trace)):
        if file is not None and not (folder := Path(file).absolute().parent).is_dir():
            raise UsageError(f"{name}: {folder}: no such folder")
        if file is not None and not os.access(folder, os.W_OK):  # fail now rather than after the run
            raise StorageError(f"{name}: {file}: cannot be written: its folder is read-only", file=str(file))
    kv_item = KV_DTYPES[options.kv_dtype].itemsize
    sizes = sizes_of(catalog, context, options.prefill_chunk, kv_item, options.logits_tokens)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # math libraries allocate before RAM use is measured
    held = process_ram()
    ram = int((available_ram() + held) * AUTO_RAM) if budget.ram is None else budget.ram
    vram = budget.vram
    if vram is None and device.type != "cpu":
        vram = int(torch.get_device_module(device).mem_get_info(device)[0] * AUTO_VRAM)
    plan = make_plan(
        sizes,
        ram=ram,
        vram=vram,
        process=max(0, held - others),
        others=others,
        min_slots=spec.experts_per_token,
        ram_slots=options.ram_slots,
        vram_slots=options.vram_slots,
        resident_trunks=options.resident_trunks,
    )
    ram = min(ram, _require_memory(plan, ram, held, device))
    return Request(catalog, options, device, context, predictor, plan, ram, budget.ram is None)


def _log_plan(request: Request) -> None:
    catalog = request.catalog
    files, context = len(catalog.files), request.context
    log.info("%s: %d files, context of %d tokens, on %s", catalog.checkpoint.path, files, context, request.device)
    for name, plan, _ in _tier_plans(request):
        parts = ", ".join(f"{part} {format_size(size)}" for part, size in plan.parts.items() if size)
        log.info("plan of %s: %s; %d expert slots; floor %s", name, parts, plan.expert_slots, format_size(plan.floor))


def _require_memory(plan: Plan, ram: int, held: int, device: torch.device) -> int:
    """Refuse a plan that cannot be held here, and warn of one that does not fit the free memory. Returns the limit of
    this process in bytes. Raises BudgetError."""
    emulated = plan.vram.parts if plan.vram is not None and device.type == "cpu" else {}
    parts = {**plan.ram.parts, "vram in host memory": sum(emulated.values())}
    needed, limit, free = sum(parts.values()), total_ram(), available_ram() + held
    if needed > limit:
        raise BudgetError(
            f"a ram budget of {format_size(ram)} leads to a plan of {format_size(needed)}, but this process can have "
            f"{format_size(limit)} (this machine's memory, or a memory cgroup's): it would be killed; lower the "
            "budget, or use 'auto'",
            floor=plan.ram.floor,
            given=ram,
            dominant=max(parts, key=lambda name: parts[name]),
        )
    if needed - SLACK > free:
        warnings.warn(
            f"the plan takes {format_size(needed)} of host memory and {format_size(free)} are free: the process may be "
            "killed, or slow down other programs; lower the ram budget, or use 'auto'",
            stacklevel=5,
        )
    return limit


def _open_recorder(file: Path, request: Request) -> Recorder:
    """Open the recorder of a trace, which stores the prefill read order. Raises UsageError, StorageError."""
    catalog, spec = request.catalog, request.catalog.spec
    if not spec.moe_layers:
        raise UsageError("trace: this model has no experts, so there is no routing to record")
    layers = [[ExpertKey(layer, expert) for expert in range(spec.experts)] for layer in spec.moe_layers]
    order = tuple(
        tuple(key.expert for key in sorted(keys, key=lambda key: catalog.record(key).begin)) for keys in layers
    )
    size = max(catalog.size(key) for key in catalog.experts())
    name = catalog.checkpoint.path.resolve().name
    info = TraceInfo(name, len(spec.layers), spec.moe_layers, spec.experts, size, order)
    try:
        return Recorder(file, info, spec.experts_per_token, request.options.trace_scores)
    except OSError as error:
        raise StorageError(f"trace: {file}: cannot be written: {error.strerror}", file=str(file)) from error


def _open_disk(request: Request, timeline: Timeline | None) -> tuple[Reader, DiskProfile, Transfer, list[str]]:
    """Open the reader, the profile of its disks and the transfer threads; and notes for ``Stats``."""
    options, catalog = request.options, request.catalog
    mirrors = [Path(folder) for folder in options.mirrors]
    arriving = arriving_in(catalog.checkpoint.path)
    probe = options.probe if arriving is None else "off"  # its reads would wait
    reader, profile, notes = open_disks(
        catalog.files, mirrors, options.reader, probe, ProfileCache(user_cache()), catalog.stamps
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
        threads = options.transfer_threads or _transfer_threads(request, profile)
        return reader, profile, Transfer(threads, timeline, profile.request_bytes), notes
    except BaseException:
        reader.close()
        raise


def _transfer_threads(request: Request, profile: DiskProfile) -> int:
    """Threads to read this model's experts at the disk's full speed, plus those for copies to vram."""
    sizes = [profile.request_bytes]
    if experts := request.catalog.experts():
        extents = request.catalog.record(experts[0]).extents
        sizes = [part.hi - part.lo for extent in extents for part in split(extent, profile.request_bytes)]
    copying = 0 if request.plan.vram is None else COPY_THREADS
    return profile.depth_of(sum(sizes) // len(sizes)) + copying


def _stop(transfer: Transfer, reader: Reader) -> None:
    if transfer.close():
        reader.close()


def _load_resident(request: Request, disk: Disk, transfer: Transfer) -> Weights:
    """The small always-resident tensors, on the compute device."""
    record = request.catalog.record(ResidentKey())
    slot = Slot(allocate(record.nbytes, HOST))
    ticket, _ = disk.fetch(ResidentKey(), slot, Priority.DEMAND, streaming=False)
    transfer.wait_any([ticket], request.options.io_timeout)
    if ticket.error is not None:
        raise ticket.error
    return weights_of(slot.buffer.to(request.device), record)


def _tier_plans(request: Request) -> list[tuple[str, TierPlan, torch.device]]:
    """Name, plan and device of each tier, lowest first."""
    plan = request.plan
    return [("ram", plan.ram, HOST)] + ([] if plan.vram is None else [("vram", plan.vram, request.device)])


def _expert_tiers(request: Request, disk: Disk, transfer: Transfer) -> tuple[Tier, ...]:
    """The tiers of the routed experts, the compute tier first."""
    size = max(map(request.catalog.size, request.catalog.experts()), default=0)
    return _tiers(request, disk, transfer, request.options.policy, lambda plan: [size] * plan.expert_slots)


def _trunk_tiers(request: Request, disk: Disk, transfer: Transfer) -> tuple[Tier, ...]:
    """The tiers of the trunks, the compute tier first."""

    def sizes(plan: TierPlan) -> list[int]:
        return [request.catalog.size(key) for key in plan.trunk] + [plan.ring, plan.ring] * bool(plan.ring)

    return _tiers(request, disk, transfer, "lru", sizes)


def _tiers(
    request: Request, disk: Disk, transfer: Transfer, name: str, sizes_in: Callable[[TierPlan], list[int]]
) -> tuple[Tier, ...]:
    """Tiers with policy ``name`` and slots of ``sizes_in``, the compute tier first."""
    catalog = request.catalog
    tiers: list[Tier] = []
    for tier, plan, device in _tier_plans(request):
        sizes = sizes_in(plan)
        info = TierInfo(len(catalog.spec.layers), len(sizes), catalog.size)
        fits = name == "default" and len(sizes) >= len(catalog.experts())  # no evictions, so nothing to learn
        source: Source = tiers[-1] if tiers else disk
        policy = make_policy("lru" if fits else name, info)
        tiers.append(Tier(tier, _slots(sizes, device), source, transfer, policy, catalog.size))
    return tuple(reversed(tiers))


def _load_trunks(request: Request, tiers: Sequence[Tier], progress: Progress) -> Trunks:
    """Load the resident trunks, lowest tier first. Returns the trunks of the compute tier."""
    catalog, options = request.catalog, request.options
    plans = _tier_plans(request)
    total = sum(catalog.size(key) for _, plan, _ in plans for key in plan.trunk)
    done = 0
    progress(done, total)
    for tier, (_, plan, _) in zip(reversed(tiers), plans, strict=True):
        trunks = Trunks(tier, plan.trunk, catalog.trunks, catalog.record, options.io_timeout, options.exact)
        for size in trunks.load():
            done += size
            progress(done, total)
    return trunks


def _slots(sizes: Sequence[int], device: torch.device) -> list[Slot]:
    """Adjacent slots of ``sizes`` in one slab."""
    slab: Tensor = allocate(sum(sizes), device)
    ends = itertools.accumulate(sizes)
    return [Slot(slab[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def _relief(request: Request, ram: Tier) -> PressureRelief | None:
    """An automatic ram budget yields to memory pressure; an explicit one does not."""
    if not request.auto or not can_decommit():
        return None
    reserve = int(request.ram_budget * (1 - AUTO_RAM) / AUTO_RAM)
    return PressureRelief(Pressure(reserve), ram, request.catalog.spec.experts_per_token)


def _platform_notes(request: Request) -> list[str]:
    notes = []
    if request.catalog.ignored:
        notes.append(f"{len(request.catalog.ignored)} tensors of multi-token prediction layers are not used")
    if request.catalog.vision:
        notes.append(f"text only: {len(request.catalog.vision)} tensors of vision are not used")
    if (most := request.catalog.spec.sparse_above) is not None:
        notes.append(f"contexts of at most {most} tokens: there attention is dense, and its indexer is not used")
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        notes.append("torch was imported before tierlm: its idle threads spin on cores needed for reads")
    if native.load() is None:
        notes.append("the compiled kernels and reads were not built (no C++ compiler): torch and Python are slower")
    if request.plan.vram is not None and request.device.type == "cpu":
        notes.append("no accelerator: vram is a second slab of host memory, on top of the ram budget")
    return notes
