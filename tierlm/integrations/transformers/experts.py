"""The routed experts of a model of transformers, served from a budget of ram."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tierlm.config import RuntimeOptions, format_size
from tierlm.engine.counters import ratio
from tierlm.errors import StorageError, UsageError
from tierlm.host import peak_ram
from tierlm.integrations.transformers.records import ExpertRecords
from tierlm.kernels import combined, gated_mlps, grouped
from tierlm.memory.disk import Disk
from tierlm.memory.executor import LinkStats
from tierlm.memory.opening import HOST, expert_tiers, open_disk, open_store, stop
from tierlm.memory.slots import can_decommit
from tierlm.planning.plan import Plan
from tierlm.policies.lookahead import Lookahead
from tierlm.policies.prediction import Predictor
from tierlm.policies.residency import TierStats
from tierlm.table import Table

FEW_TOKENS = 16  # a forward of more is a prefill


@dataclass(frozen=True, repr=False)
class ExpertStats(Table):
    """Statistics since the model was loaded. ``tokens``: that passed all layers. ``seconds``: spent in the experts;
    ``stall``: of these, waiting for reads. ``hit_rate``: share of demanded experts in memory or in flight."""

    tokens: int
    seconds: float
    stall: float
    hit_rate: float | None
    ram: TierStats
    links: dict[str, LinkStats]
    peak_ram: int
    plan: Plan
    reader: str
    notes: tuple[str, ...]

    def rows(self) -> Iterator[tuple[str, str]]:
        yield "experts", f"{self.tokens} tokens in {self.seconds:.2f} s, of which {self.stall:.2f} s waiting"
        yield "hit rate", "-" if self.hit_rate is None else f"{self.hit_rate:.1%}"
        for name, link in self.links.items():
            yield name, format_size(link.bytes)
        yield from self.plan.rows()
        yield "peak of the process", format_size(self.peak_ram)
        for note in self.notes:
            yield "note", note


class Experts:
    """Computes the routed experts of all layers, from slots of ``plan`` and from files.

    Callers may be interrupted at any moment, and may be several threads: the work is done by one thread of its own.
    ``close`` must be called.
    """

    def __init__(self, records: ExpertRecords, options: RuntimeOptions, plan: Plan, predictor: Predictor):
        self.records, self.plan = records, plan
        self._chunk, self._predictor = options.prefill_chunk, predictor
        self._pid, self._tokens, self._seconds = os.getpid(), 0, 0.0
        self._closed = False
        with ExitStack() as undo:
            self._reader, profile, self._transfer, self._notes = open_disk(records, options, plan)
            undo.callback(stop, self._transfer, self._reader)
            disk = Disk(self._reader, records.record, self._transfer, profile.request_bytes)
            (self._tier,) = expert_tiers(records, options.policy, plan, disk, HOST)
            self._lookahead = Lookahead(predictor, range(len(records.layers)))
            self._store, self._heat_file = open_store(records, options, self._tier, self._lookahead)
            self._thread = ThreadPoolExecutor(1, "tierlm-experts")
            undo.pop_all()

    def forward(self, layer: int, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of ``experts`` [T, k] of a layer for ``hidden`` [T, n]: [T, n]. ``weights``
        [T, k]. Raises UsageError, StorageError."""
        if os.getpid() != self._pid:
            raise UsageError(
                f"this model was loaded by process {self._pid} and cannot be used in its fork: load it there"
            )
        if hidden.requires_grad:
            raise UsageError("experts served by tierlm have no gradients; expected a call under torch.no_grad()")
        try:
            done = self._thread.submit(self._forward, layer, hidden, experts, weights)
        except RuntimeError as error:
            raise UsageError("this model was closed") from error
        return done.result()

    @torch.no_grad()
    def _forward(self, layer: int, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        began = time.perf_counter()
        x, weights = (tensor.to(HOST, torch.float32).contiguous() for tensor in (hidden, weights))
        ids = experts.to(HOST, torch.int64).contiguous()
        count = self.records.counts[layer]
        if len(x) and not 0 <= int(ids.min()) <= int(ids.max()) < count:  # kernels do not check
            found = f"{int(ids.min())} to {int(ids.max())}"
            raise RuntimeError(f"{self.records.layers[layer]}: expected ids from 0 to {count - 1}, found {found}")
        total = torch.empty_like(x)
        for start in range(0, len(x), self._chunk):
            chunk = slice(start, start + self._chunk)
            prefill = len(x) > FEW_TOKENS
            total[chunk] = self._weighted(layer, x[chunk], ids[chunk], weights[chunk], prefill)
        self._tokens += 0 if layer else len(x)
        self._seconds += time.perf_counter() - began
        return total.to(hidden.device, hidden.dtype)

    def _weighted(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, prefill: bool) -> Tensor:
        """``forward`` of one chunk: float32 [T, n]. Outputs are summed in the router's order, so the order in which
        experts arrive does not affect the result."""
        groups = grouped(ids, self.records.counts[layer])
        outputs = x.new_empty(len(groups.order), x.shape[1])  # [T * k, n]
        rows = x.index_select(0, groups.order // ids.shape[1]).split_with_sizes(groups.counts)
        places = dict(zip(groups.experts, zip(rows, outputs.split_with_sizes(groups.counts), strict=True), strict=True))
        targets = self._lookahead.targets(layer, prefill)
        with self._store.acquire(layer, groups.experts, streaming=prefill) as leases:
            self._predictor.observe(layer, groups.experts)
            for target, ahead in targets:
                self._store.look_ahead(target, ahead, prefill)
            for batch in itertools.chain((leases.resident(),), leases):
                gated_mlps([(*places[e], (w["gate_proj"], w["up_proj"], w["down_proj"])) for e, w in batch])
        return combined(torch.zeros_like(x), None, weights, outputs, groups.inverse)

    def stats(self) -> ExpertStats:
        """A snapshot."""
        tier = replace(self._tier.stats)
        return ExpertStats(
            tokens=self._tokens,
            seconds=self._seconds,
            stall=self._tier.stall,
            hit_rate=ratio(tier.hits + tier.late_hits, tier.hits + tier.late_hits + tier.misses),
            ram=tier,
            links=self._transfer.busy(),
            peak_ram=peak_ram(),
            plan=self.plan,
            reader=self._reader.name,
            notes=(*self._notes, *self._reader.troubles()),
        )

    def close(self) -> None:
        """Stop the threads, close the files, give back the slots and write the heat. Idempotent. Raises StorageError if
        that cannot be written."""
        if self._closed:
            return
        self._closed = True
        self._transfer.leaving = True
        self._thread.shutdown()
        if self._transfer.close():
            self._reader.close()
            if can_decommit():
                for slot in self._tier.slots:
                    slot.decommit()
        heat = self._store.heat
        if self._heat_file is not None and heat.uses:
            try:
                heat.write(self._heat_file)
            except OSError as error:
                raise StorageError(
                    f"heat (heat=False does without): {error.filename}: cannot be written: {error.strerror}",
                    file=str(error.filename),
                ) from error
