"""A server under measurement: started within a memory limit, watched, killed and stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from limited import available, memory_limit

from tierlm.config import parse_size

STARTUP = 120.0  # seconds
SAMPLE = 0.25  # seconds between two looks at the memory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tierlm_server(model: str, ram: str, options: list[str]) -> Callable[[int], list[str]]:
    """The command of `tierlm serve` for a port."""
    command = [sys.executable, "-m", "tierlm", "serve", model, "--ram", ram, "--name", "served", *options]
    return lambda port: [*command, "--port", str(port)]


def peer_server(binary: Path, model: Path, context: int, slots: int) -> Callable[[int], list[str]]:
    """The command of llama.cpp's server, or of a Python script that takes the same options, for a port."""
    command = [sys.executable] if binary.suffix == ".py" else []
    command += [str(binary), "-m", str(model), "-c", str(context), "-np", str(slots), "--host", "127.0.0.1"]
    return lambda port: [*command, "-t", str(len(os.sched_getaffinity(0))), "--port", str(port)]


class Served:
    """A running server, and its memory over time. ``command``: for a port. ``limit``: of its memory cgroup, if one can
    be made. As a context manager it stops at the end."""

    def __init__(self, command: Callable[[int], list[str]], limit: str, log: Path):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.memory: list[tuple[float, int]] = []  # (time.monotonic(), resident bytes)
        self.load_seconds = 0.0
        self._command, self._log = command(self.port), log
        self._open = ExitStack()
        self._cgroup = self._open.enter_context(memory_limit(parse_size(limit))) if available() else None
        self._process: subprocess.Popen[bytes] | None = None
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> Served:
        with ExitStack() as on_error:
            on_error.callback(self._open.close)
            on_error.callback(self.kill)
            self.start()
            self._watcher.start()
            on_error.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._open:
            self._watching.set()
            self._watcher.join()
            self._end(signal.SIGTERM)

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises RuntimeError with its last words."""
        began = time.monotonic()
        command = self._command if self._cgroup is None else self._cgroup.command(self._command)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() - began > STARTUP:
                self.kill()
                raise RuntimeError(f"the server did not start: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self.load_seconds = time.monotonic() - began

    def kill(self) -> None:
        """End it at once, as the system does when memory runs out."""
        self._end(signal.SIGKILL)

    def report(self) -> dict[str, Any]:
        """Peak of its memory cgroup with cached pages, and what was killed there; empty without a cgroup."""
        return {} if self._cgroup is None else self._cgroup.report()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def _watch(self) -> None:
        while not self._watching.wait(SAMPLE):
            process = self._process
            if process is not None:
                try:
                    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    self.memory.append((time.monotonic(), sum(one.memory_info().rss for one in whole)))
                except psutil.NoSuchProcess:  # killed meanwhile
                    continue
