"""Loads a model under a budget: checks everything, then opens it. An error leaves nothing open."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tierlm.checkpoints.disk_profile import DiskProfile
from tierlm.checkpoints.rows import Rows
from tierlm.checkpoints.views import Weights, weights_of
from tierlm.config import Budget, RuntimeOptions, format_size
from tierlm.engine.scheduler import Scheduler
from tierlm.engine.speculation.gate import Measured
from tierlm.engine.speculation.lookup import PromptLookup
from tierlm.engine.speculation.mtp import MultiTokenPrediction
from tierlm.engine.speculation.speculation import Speculation
from tierlm.errors import StorageError, UsageError
from tierlm.files import user_cache
from tierlm.kernels import native
from tierlm.load_request import LoadRequest, check
from tierlm.memory.disk import Disk
from tierlm.memory.kvblock import identity_of
from tierlm.memory.kvcache import KvCache
from tierlm.memory.kvdisk import KvDisk, open_kv_disk
from tierlm.memory.meter import Meter
from tierlm.memory.opening import HOST, expert_tiers, open_disk, open_store, open_tiers, stop, tier_plans
from tierlm.memory.pressure import Pressure, PressureRelief
from tierlm.memory.slots import Slot, allocate, can_decommit
from tierlm.memory.store import Store
from tierlm.memory.tiers import Tier
from tierlm.memory.transfer import Transfer
from tierlm.memory.trunks import Trunks
from tierlm.models.decoder import Decoder
from tierlm.models.embedding import Embedding
from tierlm.models.moe import MixtureOfExperts
from tierlm.models.mtp import PredictionLayer
from tierlm.models.router import Router
from tierlm.planning.plan import AUTO_RAM, TierPlan
from tierlm.policies.chains import Leaves
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.predictors import make_predictor
from tierlm.policies.residency import Purpose
from tierlm.runtime import Runtime
from tierlm.spec import ExpertKey, ResidentKey
from tierlm.timeline import Timeline
from tierlm.tracing.recorder import Recorder
from tierlm.tracing.trace import TraceInfo

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
SPEED = 1e9  # bytes a second of a disk that was not measured


def load_runtime(folder: Path, budget: Budget, options: RuntimeOptions, progress: Progress, others: int = 0) -> Runtime:
    """The runtime of the model in ``folder``, with its resident trunks loaded. It belongs to the calling thread.

    ``progress`` is called with the trunk bytes loaded so far and in total; it may raise to stop the load. ``others``:
    bytes of ram held by other models of this process. Raises UsageError, BudgetError, CheckpointError, StorageError;
    after an error no thread runs and no file is open.
    """
    began = time.perf_counter()
    request = check(folder, budget, options, others)
    catalog, plan, spec = request.catalog, request.plan, request.catalog.spec
    _log_plan(request)
    with ExitStack() as undo:
        timeline = None if options.timeline is None else Timeline()
        recorder = None if options.trace is None else _open_recorder(Path(options.trace), request)
        if recorder is not None:
            undo.callback(recorder.drop)
        reader, profile, transfer, notes = open_disk(catalog, options, plan, timeline)
        undo.callback(stop, transfer, reader)
        notes += _platform_notes(request)
        for note in notes:
            log.info("%s", note)
        disk = Disk(reader, catalog.record, transfer, profile.request_bytes)
        resident = _load_resident(request, disk, transfer)
        experts = expert_tiers(catalog, options.policy, plan, disk, request.device)
        trunk_tiers = _trunk_tiers(request, disk)
        trunks = _load_trunks(request, trunk_tiers, progress)
        own = [layer for layer in spec.moe_layers if layer < spec.depth]
        store, heat_file = open_store(catalog, options, experts[0], Lookahead(request.predictor, own))
        widths = [layer.attention.cache_width for layer in spec.layers]
        cache = spec.index_widths, spec.state_widths
        kv = KvCache(widths, request.context, request.kv_dtype, request.device, *cache)
        embedded = catalog.embedding
        rows = Rows(embedded, catalog.seals_of(embedded), catalog.stamps.get(embedded.file), reader)
        undo.callback(rows.close)
        moe = MixtureOfExperts(spec, Router(spec, resident), store, timeline, recorder)
        embedding = Embedding(rows, embedded, request.device)
        decoder = Decoder(spec, embedding, resident, trunks, catalog.head, kv, moe, request.device, timeline)
        kv_disk = _open_kv_disk(request, transfer, profile, notes)
        if kv_disk is not None:
            undo.callback(kv_disk.close)
        relief = _relief(request, experts[-1])
        meter = Meter(store, trunks, transfer)
        speculation = _open_speculation(request, decoder, resident, kv, store)
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
            scheduler=Scheduler(decoder, kv, meter, relief, catalog.eos, options.prefill_chunk, kv_disk, speculation),
            kv_disk=kv_disk,
            heat=store.heat,
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


def _log_plan(request: LoadRequest) -> None:
    catalog = request.catalog
    files, context = len(catalog.files), request.context
    log.info("%s: %d files, context of %d tokens, on %s", catalog.checkpoint.path, files, context, request.device)
    for name, plan, _ in tier_plans(request.plan, request.device):
        parts = ", ".join(f"{part} {format_size(size)}" for part, size in plan.parts.items() if size)
        log.info("plan of %s: %s; %d expert slots; floor %s", name, parts, plan.expert_slots, format_size(plan.floor))


def _open_recorder(file: Path, request: LoadRequest) -> Recorder:
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


def _open_kv_disk(request: LoadRequest, transfer: Transfer, profile: DiskProfile, notes: list[str]) -> KvDisk | None:
    """The store of KV blocks, if there is to be one. Says in ``notes`` why it cannot be opened. Raises UsageError."""
    layout, options, catalog = request.kv_blocks, request.options, request.catalog
    if layout is None:
        return None
    cache = user_cache()
    if options.kv_folder is None and cache is None:
        raise UsageError("kv_folder: expected a folder, since this user has no cache folder; found None")
    folder = cache / "kv" if options.kv_folder is None and cache is not None else Path(str(options.kv_folder))
    stamps = sorted((file.name, catalog.checkpoint.stamps[file].modified_ns) for file in catalog.files)
    identity = identity_of(layout, catalog.fingerprint, stamps, options.exact, request.device.type)
    size, speed = int(str(options.kv_disk)), profile.bytes_per_second or SPEED
    found = open_kv_disk(folder / catalog.fingerprint, size, layout, identity, Leaves, transfer.backlog, speed)
    if isinstance(found, str):
        notes.append(found)
        log.warning("%s", found)
        return None
    log.info("KV values of %d tokens in %s", found.tier.tokens, folder)
    return found


def _load_resident(request: LoadRequest, disk: Disk, transfer: Transfer) -> Weights:
    """The small always-resident tensors, on the compute device."""
    record = request.catalog.record(ResidentKey())
    slot = Slot(allocate(record.nbytes, HOST))
    ticket, _ = disk.fetch(ResidentKey(), slot, Purpose.DEMAND, streaming=False)
    transfer.wait_any([ticket], request.options.io_timeout)
    if ticket.error is not None:
        raise ticket.error
    return weights_of(slot.buffer.to(request.device), record)


def _trunk_tiers(request: LoadRequest, disk: Disk) -> tuple[Tier, ...]:
    """The tiers of the trunks, the compute tier first."""

    def sizes(plan: TierPlan) -> list[int]:
        return [request.catalog.size(key) for key in plan.trunk] + [plan.ring, plan.ring] * bool(plan.ring)

    return open_tiers(request.catalog, "lru", request.plan, disk, request.device, sizes)


def _load_trunks(request: LoadRequest, tiers: Sequence[Tier], progress: Progress) -> Trunks:
    """Load the resident trunks, lowest tier first. Returns the trunks of the compute tier."""
    catalog, options = request.catalog, request.options
    plans = tier_plans(request.plan, request.device)
    total = sum(catalog.size(key) for _, plan, _ in plans for key in plan.trunk)
    done = 0
    progress(done, total)
    for tier, (_, plan, _) in zip(reversed(tiers), plans, strict=True):
        trunks = Trunks(tier, plan.trunk, catalog.trunks, catalog.record, options.io_timeout, options.exact)
        for size in trunks.load():
            done += size
            progress(done, total)
    return trunks


def _open_speculation(
    request: LoadRequest, decoder: Decoder, resident: Weights, kv: KvCache, store: Store
) -> Speculation | None:
    """``store``: of the model's own layers. The layer that drafts has one of its own on the same tier."""
    options, spec = request.options, request.catalog.spec
    if not spec.mtp:
        return None if options.speculation == "off" else Speculation(PromptLookup, Measured())
    lookahead = Lookahead(make_predictor("none", spec.experts_per_token), [spec.depth])
    own = Store(store.tier, request.catalog.record, lookahead, options.io_timeout, store.heat, options.exact)
    moe = MixtureOfExperts(spec, decoder.moe.router, own, decoder.timeline)
    layer = PredictionLayer(decoder, resident, kv, moe, request.device)
    return Speculation(partial(MultiTokenPrediction, layer), Measured(), spec.hidden)


def _relief(request: LoadRequest, ram: Tier) -> PressureRelief | None:
    """An automatic ram budget yields to memory pressure; an explicit one does not."""
    if not request.auto or not can_decommit():
        return None
    reserve = int(request.ram_budget * (1 - AUTO_RAM) / AUTO_RAM)
    return PressureRelief(Pressure(reserve), ram, request.catalog.spec.experts_per_token)


def _platform_notes(request: LoadRequest) -> list[str]:
    notes = []
    if request.catalog.ignored:
        notes.append(f"{len(request.catalog.ignored)} tensors of multi-token prediction layers are not used")
    if request.catalog.vision:
        notes.append(f"text only: {len(request.catalog.vision)} tensors of vision are not used")
    if native.load() is None:
        notes.append("the compiled kernels and reads were not built (no C++ compiler): torch and Python are slower")
    if request.plan.vram is not None and request.device.type == "cpu":
        notes.append("no accelerator: vram is a second slab of host memory, on top of the ram budget")
    return notes
