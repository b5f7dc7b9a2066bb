"""The engine thread: it owns one model, from load to close."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import abc, deque
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

import torch

from tierlm.config import Budget, RuntimeOptions
from tierlm.engine.messages import Ask, Cancel, Close, Message, Submit
from tierlm.engine.scheduler import Scheduler
from tierlm.engine.sequence import Sequence
from tierlm.errors import TierlmError, UsageError, forget_frames
from tierlm.host import require_threads
from tierlm.loading import load_runtime
from tierlm.memory.pressure import INTERVAL, PressureRelief
from tierlm.processors import compute_threads
from tierlm.runtime import Runtime

LEAVE = 10.0  # seconds that a model gets to close, when Python exits or another one is loaded

News = tuple[int, int] | Runtime | BaseException  # of a load: bytes so far and in total, the result, or its error


class NewsBox(Protocol):
    """Where the client finds the news of a load."""

    def put(self, item: News, /) -> None: ...


class Abandoned(Exception):
    """Nobody waits any more for this load or step."""


class Worker(threading.Thread):
    """Loads a model, runs its steps and closes it. A KeyboardInterrupt never comes here: Python raises it in the main
    thread only. All computation stays on this thread, so that kernels and OpenMP keep one team each.

    Clients use ``inbox``, ``news`` and ``check``; it knows nothing of them but ``owner``, which dies when the last one
    is dropped. ``failure``: the error of closing. ``bug``: what ended it.
    """

    def __init__(self, folder: Path, budget: Budget, options: RuntimeOptions, news: NewsBox):
        super().__init__(name="tierlm-engine", daemon=True)
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.owner: weakref.ref[object] | None = None
        self.leaving = False
        self.failure: BaseException | None = None
        self._load_arguments, self._news = (folder, budget, options), news
        self._pid = os.getpid()
        self._runtime: Runtime | None = None
        self._mail: deque[Message] = deque()  # received during a step
        self._gone: set[Sequence] = set()  # cancelled by mail
        self._ended = False
        self.bug: BaseException | None = None

    def begin(self) -> None:
        """Start this thread. Run it in a thread of its own: ``start`` waits on a Condition, which an interrupt of the
        main thread would leave locked."""
        try:
            self.start()
        except RuntimeError as error:
            self._news.put(error)

    def leave(self) -> None:
        """Abandon the step in progress, even if it waits for a stalled disk. ``Close`` must follow."""
        self.leaving = True
        if self._runtime is not None:
            self._runtime.transfer.leaving = True

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child process, where the thread does not exist."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raises UsageError once the model is closed or in another process, and TierlmError after a bug.

        Call it after a message was sent and before its answer is awaited: what was sent before it passes is answered.
        """
        if self.forked:
            raise UsageError(
                f"this model was loaded by process {self._pid} and cannot be used in its fork {os.getpid()}: load it "
                "there, or start processes with the method 'spawn'"
            )
        if self.bug is not None:
            what = f"{type(self.bug).__name__}: {self.bug}"
            raise TierlmError(f"this is a bug in tierlm: {what}; the model was closed, load it again") from self.bug
        if self._ended:
            raise UsageError("this model is closed")

    def run(self) -> None:
        atexit.register(self._leave)
        try:
            self._runtime = self._load()
            if self._runtime is not None:
                self._serve(self._runtime)
        finally:
            self._runtime = None
            atexit.unregister(self._leave)

    def _load(self) -> Runtime | None:
        try:
            folder, budget, options = self._load_arguments
            count = options.threads or min(torch.get_num_threads(), compute_threads())
            if count != torch.get_num_threads():
                torch.set_num_threads(count)  # of this thread, which computes everything
            require_threads(2 * (count - 1), "kernels and OpenMP")  # which would end the process
            runtime = load_runtime(folder, budget, options, self._report, self._others())
        except BaseException as error:  # the client raises it
            self._ended = True
            self._news.put(forget_frames(error))
            return None
        self._news.put(runtime)
        return runtime

    def _report(self, done: int, total: int) -> None:
        """The progress of a load. Raises Abandoned if the client is gone."""
        if not self.inbox.empty():
            raise Abandoned
        self._news.put((done, total))

    def _others(self) -> int:
        """Bytes held by other models of this process, after those that are closing are gone."""
        others = [thread for thread in threading.enumerate() if isinstance(thread, Worker) and thread is not self]
        for other in others:
            # One whose load was interrupted as it began is listed before it runs, holds nothing, and cannot be joined.
            if other.is_alive() and (other.leaving or (other.owner is not None and other.owner() is None)):
                other.join(LEAVE)
        return sum(other._runtime.held for other in others if other._runtime is not None)

    def _serve(self, runtime: Runtime) -> None:
        try:
            while self._receive(runtime.scheduler):
                try:
                    runtime.scheduler.step(self._watch)
                except Abandoned:
                    continue
        except BaseException as error:
            if not self.leaving:
                self.bug = forget_frames(error)
        self._ended = True  # a client that sees it answers itself; the messages of the others are in the inbox
        while self._mail or not self.inbox.empty():
            if isinstance(message := self._next(), Submit):
                runtime.scheduler.submit(message.sequences)
        runtime.scheduler.close()
        try:
            runtime.close()
        except BaseException as error:
            self.failure = forget_frames(error)

    def _receive(self, scheduler: Scheduler) -> bool:
        """Take messages, and wait for them, until there is a step to run. False if the model is to be closed."""
        self._gone.clear()
        while self._mail or not self.inbox.empty() or not scheduler.wanted:
            match self._next(scheduler.relief):
                case Submit(sequences):
                    scheduler.submit(sequences)
                case Ask(sequences):
                    scheduler.ask(sequences)
                case Cancel(sequences):
                    scheduler.cancel(sequences)
                case Close():
                    return False
            sequences = ()  # drop the references while waiting
        return True

    def _next(self, relief: PressureRelief | None = None) -> Message:
        """The next message. A model that waits for it follows the memory pressure on this machine."""
        if self._mail:
            return self._mail.popleft()
        while relief is not None:
            try:
                return self.inbox.get(timeout=INTERVAL)
            except Empty:
                relief.follow()
        return self.inbox.get()

    def _watch(self, batch: abc.Sequence[Sequence]) -> None:
        """Raises Abandoned if nobody waits for any of ``batch``. The messages are for ``_receive``."""
        while not self.inbox.empty():
            self._mail.append(message := self.inbox.get())
            if isinstance(message, Close):
                raise Abandoned
            if isinstance(message, Cancel):
                self._gone.update(message.sequences)
        if self._gone.issuperset(batch):
            raise Abandoned

    def _leave(self) -> None:
        """Close when Python exits."""
        if not self.forked:
            self.leave()
            self.inbox.put(Close())
            self.join(LEAVE)
