"""The thread that moves KV blocks between memory and the files of their store."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from tierlm.checkpoints.reader import host_memory
from tierlm.host import cannot_start
from tierlm.memory.kvblock import BlockLayout, Bytes
from tierlm.memory.kvfiles import BlockFiles, Header

LOOK = 0.002  # seconds between two looks whether demands still wait
PATIENCE = 0.5  # seconds that a write waits for demands


class Buffer:
    """Memory for one block, aligned for direct reads: as bytes, and as torch and numpy see them."""

    def __init__(self, nbytes: int):
        self.memory = memoryview(host_memory(nbytes))
        self.tensor: Tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.bytes: Bytes = np.frombuffer(self.memory, dtype=np.uint8)


@dataclass(slots=True, eq=False)
class Move:
    """A block on its way into ``buffer``, or out of it. ``writes``: to ``slot``. ``header``: of the slot, its checksum
    found when it is written. ``done``: set last, with ``error`` or ``seconds``."""

    slot: int
    header: Header
    buffer: Buffer
    writes: bool
    error: Exception | None = None
    seconds: float = 0.0
    done: bool = False


class Damaged(Exception):
    """A block that is not what its header says, or that its format cannot hold."""


class Mover:
    """Runs moves in order, reads before writes. Writes also wait for ``demands``, the bytes that layers wait for.

    A read begun before a write of the same slot is done before it. Raises TierlmError without a thread.
    """

    def __init__(self, files: BlockFiles, layout: BlockLayout, demands: Callable[[], int]):
        self._files, self._layout, self._demands = files, layout, demands
        self._scratch = None if layout.format == "exact" else Buffer(layout.stored)
        self._changed = threading.Condition()
        self._reads, self._writes = deque[Move](), deque[Move]()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tierlm-kv", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise cannot_start(1, "the KV blocks on disk") from error

    def submit(self, move: Move) -> None:
        """Begin ``move``. Its buffer belongs to the thread until it is done."""
        with self._changed:
            (self._writes if move.writes else self._reads).append(move)
            self._changed.notify_all()

    def wait(self, move: Move, timeout: float) -> None:
        """Return once ``move`` is done, or after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: move.done, timeout)

    def close(self, timeout: float) -> bool:
        """Finish what was submitted and end. False if the thread is stuck after ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (move := self._take()) is not None:
            began = time.perf_counter()
            try:
                self._write(move) if move.writes else self._read(move)
            except Exception as error:  # the engine counts it
                move.error = error
            move.seconds = time.perf_counter() - began
            with self._changed:
                move.done = True
                self._changed.notify_all()
            move = None  # drop the reference while waiting

    def _take(self) -> Move | None:
        """Wait for the next move; None to end."""
        since = time.monotonic()
        with self._changed:
            while True:
                if self._reads:
                    return self._reads.popleft()
                if not self._writes:
                    if self._closing:
                        return None
                    self._changed.wait()
                    since = time.monotonic()
                elif self._closing or not self._demands() or time.monotonic() - since > PATIENCE:
                    return self._writes.popleft()
                else:
                    self._changed.wait(LOOK)

    def _write(self, move: Move) -> None:
        block = move.buffer
        if self._scratch is not None:
            if not self._layout.encode(move.buffer.bytes, self._scratch.bytes):
                raise Damaged("a value is not finite")
            block = self._scratch
        stored = block.memory[: self._layout.stored]
        move.header = Header(move.header.key, move.header.serial, xxhash.xxh3_64_intdigest(stored))
        self._files.write(move.slot, move.header, stored)

    def _read(self, move: Move) -> None:
        block = self._scratch or move.buffer
        stored = block.memory[: self._layout.stored]
        self._files.read(move.slot, stored)
        if (found := xxhash.xxh3_64_intdigest(stored)) != move.header.checksum:
            raise Damaged(f"slot {move.slot}: expected xxh3_64 {move.header.checksum:016x}, found {found:016x}")
        if self._scratch is not None:
            self._layout.decode(self._scratch.bytes, move.buffer.bytes)
