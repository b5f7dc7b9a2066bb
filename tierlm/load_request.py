"""A checked load: what can be known of it without opening or allocating anything."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tierlm.checkpoints.codec import load_zstandard
from tierlm.config import DEFAULT_CONTEXT, Budget, RuntimeOptions, format_size
from tierlm.errors import BudgetError, StorageError, UsageError
from tierlm.host import available_ram, process_ram, total_ram
from tierlm.memory.kvblock import BlockLayout, require_cut
from tierlm.memory.kvdisk import staging_of
from tierlm.memory.opening import HOST
from tierlm.models.catalog import Catalog
from tierlm.models.outline import kv_dtype_of, sizes_of
from tierlm.planning.plan import AUTO_RAM, SLACK, Plan, make_plan
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.policies.prediction import Predictor
from tierlm.policies.predictors import make_predictor

AUTO_VRAM = 0.9  # share of the free memory
KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadRequest:
    """A checked load: everything known without opening or allocating anything."""

    catalog: Catalog
    options: RuntimeOptions
    device: torch.device
    context: int
    kv_dtype: torch.dtype
    predictor: Predictor
    plan: Plan
    ram_budget: int
    auto: bool  # the ram budget was derived from the free memory
    kv_blocks: BlockLayout | None  # of KV values on disk


def check(folder: Path, budget: Budget, options: RuntimeOptions, others: int) -> LoadRequest:
    """Check a load before anything is opened. ``others``: bytes of ram held by other models of this process. Raises
    UsageError, BudgetError, CheckpointError, StorageError."""
    device, catalog = find_device(options.device), Catalog(folder, options.speculation == "mtp")
    spec = catalog.spec
    if catalog.compressed:
        load_zstandard()
    if options.context is not None and options.context > spec.max_position:
        raise UsageError(f"context: expected at most the model's own {spec.max_position}, found {options.context}")
    if options.speculation != "off" and any(spec.state_widths):
        raise UsageError(
            f"speculation: expected off for {spec.model_type}, found {options.speculation}: a rejected draft cannot be "
            "taken out of the state of gated DeltaNet"
        )
    if spec.mtp and options.trace is not None:
        raise UsageError("trace: expected None with speculation mtp, whose layer is in no trace")
    context = options.context or min(spec.max_position, DEFAULT_CONTEXT)
    predictor = make_predictor(options.predictor, spec.experts_per_token)
    make_policy(options.policy, TierInfo(len(spec.layers), 1))
    for name, file in (("timeline", options.timeline), ("trace", options.trace)):
        if file is not None and not (folder := Path(file).absolute().parent).is_dir():
            raise UsageError(f"{name}: {folder}: no such folder")
        if file is not None and not os.access(folder, os.W_OK):  # fail now rather than after the run
            raise StorageError(f"{name}: {file}: cannot be written: its folder is read-only", file=str(file))
    kv_dtype, blocks = KV_DTYPES[kv_dtype_of(catalog, options)], None
    sizes = sizes_of(catalog, context, options.prefill_chunk, kv_dtype.itemsize, options.logits_tokens)
    if options.kv_disk is not None:
        require_cut(spec.state_widths)
        widths = [*(layer.attention.cache_width for layer in spec.layers), *spec.index_widths]
        blocks = BlockLayout.of(widths, kv_dtype, options.kv_format)
        sizes = replace(sizes, staging=staging_of(blocks))
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
    ram = min(ram, require_memory(plan, ram, held, device))
    return LoadRequest(catalog, options, device, context, kv_dtype, predictor, plan, ram, budget.ram is None, blocks)


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


def require_memory(plan: Plan, ram: int, held: int, device: torch.device) -> int:
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
