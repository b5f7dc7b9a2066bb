"""The engine thread's life: forgotten models, forks, thread limits, errors that are bugs, exits."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from test_llm import faulty
from test_loading import open_files

from tierlm import LLM, Budget, BudgetError, SamplingParams, TierlmError, UsageError
from tierlm.engine.sequence import Pace, Progress, Sequence

RAM = Budget("8GiB")
TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_python(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    lines = "import sys\nfrom tierlm import *\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n" + source
    command = [sys.executable, "-c", lines, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("how", ["deleted", "rebound", "in a cycle", "with a stream", "never closed after an error"])
def test_a_forgotten_model_gives_everything_back(how: str, toy_v3: tuple[Path, Any]) -> None:
    threads, files = threading.active_count(), open_files()
    llm: Any = LLM.load(toy_v3[0], budget=RAM)
    slab = weakref.ref(llm._runtime.experts[0].slots[0].buffer)
    llm.generate([[5, 6, 7]], TEN)
    if how == "deleted":
        del llm
    elif how == "rebound":
        llm = None
    elif how == "in a cycle":
        llm.itself = llm
        del llm
        gc.collect()
    elif how == "with a stream":
        stream = llm.stream([5, 6, 7], TEN)
        del llm
        assert len(list(stream)) == 10
        del stream
    else:
        with pytest.raises(UsageError):
            llm.generate([[999]])
        llm = None
    wait_until(lambda: threading.active_count() <= threads)
    assert open_files() <= files
    wait_until(lambda: slab() is None)


def test_a_closed_model_gives_its_memory_back(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        slab = weakref.ref(llm._runtime.experts[0].slots[0].buffer)  # type: ignore[union-attr]
        llm.generate([[5, 6, 7]], TEN)
    assert slab() is None
    assert llm.stats().new_tokens == 10


def test_a_budget_error_names_other_models(toy_v3: tuple[Path, Any]) -> None:
    with LLM.load(toy_v3[0], budget=RAM) as llm:
        llm.generate([[5, 6, 7]], TEN)
        with pytest.raises(BudgetError, match=r"other loaded models .*, or close the other models of this process"):
            LLM.load(toy_v3[0], budget=Budget("1MiB"))
    for forget in (False, True):
        llm = LLM.load(toy_v3[0], budget=RAM)
        if forget:
            del llm
        else:
            llm.close()
        with pytest.raises(BudgetError) as caught:
            LLM.load(toy_v3[0], budget=Budget("1MiB"))
        assert "other" not in str(caught.value)


def test_a_stream_after_close(toy_v3: tuple[Path, Any]) -> None:
    llm = LLM.load(toy_v3[0], budget=RAM)
    begun, new = llm.stream([5, 6], TEN), llm.stream([5, 6], TEN)
    next(begun)
    llm.close()
    for stream in (begun, new):
        with pytest.raises(UsageError, match="this model is closed"):
            next(stream)
    for call in (lambda: llm.generate([[1]]), lambda: llm.logits([1]), lambda: llm.codec and next(llm.stream([1]))):
        with pytest.raises(TierlmError):
            call()


def test_closing_does_not_wait_for_a_stalled_disk(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, stalled = threading.Event(), threading.Event()
    with faulty(toy_v3[0], io_timeout=3600) as (llm, reader), ThreadPoolExecutor(1) as pool:

        def stall(request: Any, buffer: memoryview) -> bool:
            stalled.set()
            return not gate.wait(120)

        reader.fault = stall
        transfer: Any = llm._runtime.transfer  # type: ignore[union-attr]
        monkeypatch.setattr(transfer, "close", partial(transfer.close, 0.01))  # one of its threads is stuck
        running = pool.submit(llm.generate, [[5, 6, 7]], TEN)
        assert stalled.wait(60)
        llm.close()
        assert not gate.is_set()
        with pytest.raises(UsageError, match="closed"):
            running.result()
        gate.set()


def test_a_bug_reaches_all_who_wait(toy_v3: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    threads, files = threading.active_count(), open_files()
    llm: Any = LLM.load(toy_v3[0], budget=RAM)
    paused = llm.stream([5, 6], TEN)
    next(paused)
    inbox, scheduler, found = llm._client.worker.inbox, llm._runtime.scheduler, []

    def fail(*arguments: Any, **named: Any) -> None:
        wait_until(lambda: inbox.qsize() + len(scheduler._waiting) // 2 == 2)  # both requests are there
        raise ZeroDivisionError("made up")

    def work() -> None:
        with pytest.raises(TierlmError, match="this is a bug in tierlm: ZeroDivisionError: made up; the model was clo"):
            llm.generate([[5, 6], [7]], TEN)
        found.append(True)

    monkeypatch.setattr(scheduler, "step", fail)
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == [True, True]
    with pytest.raises(TierlmError, match="made up"):
        next(paused)
    with pytest.raises(TierlmError, match="made up"):
        llm.logits([1])
    llm.close()
    assert threading.active_count() <= threads and open_files() <= files


def test_a_bug_in_a_step_reaches_those_that_it_has_ended(toy_v3: tuple[Path, Any]) -> None:
    class Wrong:
        def choose(self, *arguments: Any) -> int:
            raise ZeroDivisionError("made up")

    with LLM.load(toy_v3[0], budget=RAM) as llm:
        scheduler, params, mailbox = llm._loaded().scheduler, replace(TEN, max_new_tokens=1), SimpleQueue[Progress]()
        ended, failed = (Sequence([5, 6], params, mailbox, place, Pace.END) for place in range(2))
        failed.sampler = Wrong()  # type: ignore[assignment]
        scheduler.submit([ended, failed])
        with pytest.raises(ZeroDivisionError):
            scheduler.step(lambda batch: None)
        scheduler.close()
        assert [mailbox.get(timeout=1).finish for _ in range(2)] == ["length", "error"]


FORK = """
import os, time
params = SamplingParams(max_new_tokens=6, ignore_eos=True)
llm = LLM.load(folder, budget=Budget("8GiB"), ram_slots=5)
stream = llm.stream([5, 6], params)
first = next(stream).ids
child = os.fork()
if child == 0:
    calls = [lambda: llm.generate([[5, 6]], params), lambda: next(stream), lambda: llm.logits([1])]
    for call in calls:
        try:
            call()
        except UsageError as error:
            assert "cannot be used in its fork" in str(error), error
        else:
            os._exit(3)
    llm.close()
    with LLM.load(folder, budget=Budget("8GiB")) as own:
        assert own.generate([[5, 6]], params)[0].ids[:1] == first
    sys.exit(7)  # through the handlers and destructors of an ordinary exit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
ids = first + [token for piece in stream for token in piece.ids]
assert ids == llm.generate([[5, 6]], params)[0].ids
"""


def test_a_fork_is_told_and_the_parent_goes_on(toy_v3: tuple[Path, Any]) -> None:
    """The parent then exits without closing its model."""
    done = run_python(FORK, toy_v3[0])
    assert done.returncode == 0, done.stderr


LIMITED = """
import resource, threading
import torch
from tierlm.memory.compiled import Reads, load

def refused(what, act):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, -1))  # room for the stacks of some 30 threads
    try:
        act()
    except TierlmError as error:
        assert what in str(error) and "ulimit -u" in str(error), error
    else:
        sys.exit(f"{what}: nothing was refused")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert threading.active_count() == 1, threading.enumerate()

small = dict(budget=Budget("8GiB"), ram_slots=4, transfer_threads=2)
LLM.load(folder, **small).close()
refused("transfers", lambda: LLM.load(folder, **{**small, "transfer_threads": 100}))
if load() is not None:
    refused("reads", lambda: Reads(100, 4, 0, 0, lambda: None, None))
refused("OpenMP", lambda: LLM.load(folder, **small, threads=100))
with LLM.load(folder, **small) as llm:
    assert len(llm.generate([[5, 6]], SamplingParams(max_new_tokens=3, ignore_eos=True))[0].ids) == 3
import _thread
def no_thread(*arguments):
    raise RuntimeError("can't start new thread")
_thread.start_new_thread = no_thread
refused("the engine", lambda: LLM.load(folder, **small))
"""


def test_limits_of_threads_are_errors(toy_v3: tuple[Path, Any]) -> None:
    """The limit is address space, since that of processes does not bind root."""
    done = run_python(LIMITED, toy_v3[0])
    assert done.returncode == 0, done.stderr


EXIT = """
import threading
llm = LLM.load(folder, budget=Budget("8GiB"), ram_slots=5)
stream = llm.stream([5, 6], SamplingParams(max_new_tokens=100, ignore_eos=True))
next(stream)
def work():
    try:
        llm.generate([[i + 2] for i in range(20)], SamplingParams(max_new_tokens=200, ignore_eos=True))
    except UsageError:
        pass
threading.Thread(target=work, daemon=True).start()
"""


def test_an_exit_with_an_open_model_and_a_step_in_progress(toy_v3: tuple[Path, Any]) -> None:
    done = run_python(EXIT, toy_v3[0])
    assert (done.returncode, done.stderr) == (0, "")
