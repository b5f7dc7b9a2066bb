"""The parts of a loaded model, made by loading.py, and how they are closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tierlm.checkpoints.disk_profile import DiskProfile
from tierlm.checkpoints.reader import Reader
from tierlm.config import RuntimeOptions
from tierlm.engine.scheduler import Scheduler
from tierlm.errors import StorageError
from tierlm.memory.heat import Heat
from tierlm.memory.kvdisk import KvDisk
from tierlm.memory.pressure import PressureRelief
from tierlm.memory.store import Store
from tierlm.memory.tiers import Tier
from tierlm.memory.transfer import Transfer
from tierlm.models.catalog import Catalog
from tierlm.models.decoder import Decoder
from tierlm.planning.plan import Plan
from tierlm.timeline import Timeline
from tierlm.tracing.recorder import Recorder


@dataclass(frozen=True)
class Runtime:
    """One model under one budget. ``experts`` and ``trunk_tiers``: the compute tier first.

    ``ram_budget`` in bytes, ``context`` in tokens. ``loading_notes``: how platform and checkpoint affected the load.
    ``heat_file``: None if heat is not saved.
    """

    catalog: Catalog
    options: RuntimeOptions
    device: torch.device
    context: int
    plan: Plan
    ram_budget: int
    reader: Reader
    disk_profile: DiskProfile
    transfer: Transfer
    experts: tuple[Tier, ...]
    trunk_tiers: tuple[Tier, ...]
    store: Store
    decoder: Decoder
    scheduler: Scheduler
    kv_disk: KvDisk | None
    heat: Heat
    heat_file: Path | None
    recorder: Recorder | None
    timeline: Timeline | None
    relief: PressureRelief | None
    loading_notes: tuple[str, ...]
    load_seconds: float

    @property
    def notes(self) -> list[str]:
        relief = [] if self.relief is None else self.relief.notes()
        stored = [] if self.kv_disk is None else self.kv_disk.troubles()
        return [*self.loading_notes, *self.reader.troubles(), *relief, *stored]

    @property
    def logits_room(self) -> int:
        """Maximum bytes of the result of a logits call."""
        parts = self.plan.ram.parts
        return self.ram_budget - sum(parts.values()) + parts["logits"]

    @property
    def held(self) -> int:
        """Bytes of ram in use: filled slots, KV cache, states and resident tensors."""
        tiers = [tier for tier in (*self.experts, *self.trunk_tiers) if tier.name == "ram"]
        parts = self.plan.ram.parts
        slots = sum(slot.size for tier in tiers for slot in list(tier.slots) if slot.filled)
        return slots + sum(parts.get(name, 0) for name in ("KV cache", "states", "routers and norms"))

    def close(self) -> None:
        """Stop the threads, close the files, and write heat, trace and timeline. If a thread is stuck in a read, its
        files stay open. Raises StorageError if a write fails, after all the others."""
        if self.kv_disk is not None:
            self.kv_disk.close()
        if self.transfer.close():
            self.reader.close()
        self.decoder.embedding.close()
        writes: dict[str, Callable[[], None]] = {}
        if self.heat_file is not None and self.heat.uses:
            writes["heat (heat=False, --no-heat, does without)"] = partial(self.heat.write, self.heat_file)
        if self.recorder is not None:
            writes["trace"] = self.recorder.close
        if self.timeline is not None and self.options.timeline is not None:
            writes["timeline"] = partial(self.timeline.write, Path(self.options.timeline))
        failed: dict[str, OSError] = {}
        for what, write in writes.items():
            try:
                write()
            except OSError as error:
                failed[what] = error
        if failed:
            told = [f"{what}: {error.filename}: cannot be written: {error.strerror}" for what, error in failed.items()]
            raise StorageError("; ".join(told), file=str(next(iter(failed.values())).filename))
