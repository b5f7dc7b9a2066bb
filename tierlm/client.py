"""The side of the engine thread that callers use. An interrupt at any instruction leaves the engine whole.

What must not be lost is one call in C: ``partial(inbox.put, message)`` ends before Python looks for signals. Nothing
here holds a lock.
"""

from __future__ import annotations

import _thread
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from torch import Tensor

from tierlm.config import Budget, RuntimeOptions, SamplingParams
from tierlm.engine.messages import Ask, Cancel, Close, Submit
from tierlm.engine.sequence import Keep, Mailbox, Pace, Progress
from tierlm.engine.sequence import Sequence as TokenSequence
from tierlm.host import cannot_start
from tierlm.runtime import Runtime
from tierlm.worker import News, NewsBox, Worker

Box = TypeVar("Box", bound=Mailbox)
OnPrefill = Callable[[int, int], None]  # tokens of the prompts that have run, and all
TICK = 0.1  # seconds between two calls of it


class Client:
    """A model on its engine thread. When the client is dropped, the model closes.

    ``news``: where to put the news of the load.
    """

    def __init__(self, folder: Path, budget: Budget, options: RuntimeOptions, news: NewsBox):
        self.worker = Worker(folder, budget, options, news)
        self._stop = partial(self.worker.inbox.put, Close())
        self.worker.owner = weakref.ref(self, self._stop)

    def start(self) -> None:
        """Begin to load. Raises TierlmError if no thread can be started."""
        try:
            _thread.start_new_thread(self.worker.begin, ())
        except RuntimeError as error:
            raise cannot_start(1, "the engine") from error

    def loaded(self, news: News) -> Runtime | None:
        """The result of the load if ``news`` is its last, or raises its error."""
        if isinstance(news, BaseException):
            if self.worker.ident is not None:
                self.worker.join()
            raise news
        return None if isinstance(news, tuple) else news

    def abandon(self) -> None:
        """Let the model close by itself, loaded or not."""
        self.worker.leave()
        self._stop()

    def close(self) -> None:
        """Close the model and wait for it. Raises the error of closing. No-op in a forked process."""
        if self.worker.forked:
            return
        self.abandon()
        self.worker.join()
        failure, self.worker.failure = self.worker.failure, None
        if failure is not None:
            raise failure


class Request(Generic[Box]):
    """Sequences that are submitted together, with one mailbox. Cancelled when it is dropped.

    ``prompts``: ids and parameters of each. ``logits``, ``keep``: see Sequence. ``on_prefill``: called by ``submit``,
    and by ``next`` while it waits, until all prompts have run. ``cancel``: drop its sequences; may be called at any
    time, and more than once.
    """

    def __init__(
        self,
        client: Client,
        mailbox: Box,
        prompts: Iterable[tuple[Sequence[int], SamplingParams]],
        pace: Pace,
        logits: Tensor | None = None,
        keep: Keep | None = None,
    ):
        self.mailbox, self._client, self._pace = mailbox, client, pace
        self.on_prefill: OnPrefill | None = None
        self._put = client.worker.inbox.put
        self.sequences = tuple(
            TokenSequence(ids, params, mailbox, place, pace, logits, keep)
            for place, (ids, params) in enumerate(prompts)
        )
        self.cancel = partial(self._put, Cancel(self.sequences))
        for sequence in self.sequences:
            sequence.request = weakref.ref(self, self.cancel)

    def submit(self) -> None:
        """Queue the sequences. Call it inside the ``try`` whose ``finally`` cancels them. Raises UsageError."""
        self._client.worker.check()
        self._report()
        self._put(Submit(self.sequences))

    def cancel_one(self, place: int) -> None:
        """Drop the sequence at ``place``."""
        self._put(Cancel((self.sequences[place],)))

    def ask(self) -> None:
        """Make sure that the mailbox has progress or will get some. Raises UsageError once the model is closed."""
        if self._pace is Pace.ASKED and self.mailbox.empty():
            self._put(Ask(self.sequences))
        self._client.worker.check()

    def checked(self, progress: Progress) -> Progress:
        """``progress``, unless it says that the model was closed: then raises UsageError. Raises the error of logits:
        a part of them is no result."""
        if progress.finish == "error" and progress.error is None:
            self._client.worker.check()
        if progress.error is not None and self.sequences[progress.place].logits is not None:
            raise progress.error
        return progress

    def next(self: Request[SimpleQueue[Progress]]) -> Progress:
        """Wait for the next progress of any of the sequences. Raises UsageError."""
        self.ask()
        while True:
            try:
                progress = self.mailbox.get(timeout=None if self.on_prefill is None else TICK)
            except Empty:
                self._report()
            else:
                self._report()
                return self.checked(progress)

    def _report(self) -> None:
        if self.on_prefill is not None:
            done = sum(sequence.prefilled for sequence in self.sequences)
            total = sum(len(sequence.prompt) for sequence in self.sequences)
            self.on_prefill(done, total)
            if done == total:
                self.on_prefill = None


def load(
    folder: Path, budget: Budget, options: RuntimeOptions, progress: Callable[[int, int], None] | None
) -> tuple[Client, Runtime]:
    """Load a model on a thread of its own. ``progress`` is called here. After an error or an interrupt, the thread
    closes what it has opened."""
    news: SimpleQueue[News] = SimpleQueue()
    client = Client(folder, budget, options, news)
    try:
        client.start()
        while (runtime := client.loaded(item := news.get())) is None:
            if progress is not None and isinstance(item, tuple):
                progress(*item)
        return client, runtime
    except BaseException:
        client.abandon()
        raise
