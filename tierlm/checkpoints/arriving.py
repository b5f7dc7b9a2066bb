"""Fetching from the Hub: what a read waits for first, the rest behind it. No torch."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from tierlm.checkpoints.checkpoint import MAX_HEADER
from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.checkpoints.staging import MISSING, Staged, StagedFile
from tierlm.config import format_size

BATCH = 16  # chunks of one request in the background: a demand for one of them waits for all before it
STALL = 30.0  # seconds without a chunk before a read fails
TIMEOUT = 10.0  # seconds without a byte before a connection is given up
PAUSE = 0.5  # seconds between attempts
CONNECTIONS = 8  # for headers
FILLERS = 4  # connections in the background
GGUF_HEADER = 32 * 2**20  # bytes; twice that of a vocabulary of 250,000 tokens with merges


@dataclass(eq=False)
class _Download:
    """``busy``: chunks on their way; ``location``: where the Hub's address led to; ``finishing``: held by the thread
    that checks the complete file."""

    file: StagedFile
    busy: set[int] = field(default_factory=set)
    location: str | None = None
    finishing: threading.Lock = field(default_factory=threading.Lock)


class Arrivals:
    """Fetches the weights of a staged folder. Thread-safe. Raises CheckpointError."""

    def __init__(self, folder: Path):
        self._staged = Staged(folder)
        self._downloads = {path: _Download(file) for path, file in self._staged.files.items()}
        self._changed = threading.Condition()
        self._demands, self._closed = 0, False
        self._threads: list[threading.Thread] = []

    @property
    def files(self) -> list[Path]:
        return list(self._downloads)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are here, and of all files."""
        return self._staged.progress

    def whole(self, path: Path) -> bool:
        """Whether a read of ``path`` never waits."""
        return path not in self._downloads or self._downloads[path].file.whole

    def start(self) -> None:
        """Fetch what no read asks for, in the order of the files, behind what reads wait for. Raises OSError if the
        disk has too little room."""
        here, total = self.progress
        if (free := shutil.disk_usage(self._staged.cache).free) < total - here:
            self.close()
            raise OSError(
                f"{self._staged.cache}: {format_size(total - here)} are still to arrive from the Hub, "
                f"{format_size(free)} of the disk are free; free some, or set HF_HUB_CACHE to a folder of another disk"
            )
        self._threads = [
            threading.Thread(target=self._fill, name=f"tierlm-arriving-{number}", daemon=True)
            for number in range(FILLERS)
        ]
        for thread in self._threads:
            thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for all files, at most about ``timeout`` seconds. Returns whether they are whole. Raises OSError if one
        arrived damaged."""
        for thread in self._threads:
            thread.join(timeout / len(self._threads))
        files = self._staged.files.values()
        if damaged := [file.error for file in files if file.error is not None]:
            raise OSError(damaged[0])
        return all(file.whole for file in files)

    def close(self) -> None:
        """Stop. What is here stays for the next time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._staged.close()

    def wait(self, path: Path, start: int, stop: int) -> None:
        """Return once the bytes ``start`` to ``stop`` of ``path`` are here, fetching them ahead of all others. Raises
        OSError after STALL seconds without progress."""
        if self.whole(path):
            return
        download = self._downloads[path]
        chunks = download.file.chunks(start, stop)
        with self._changed:
            self._demands += 1
        try:
            while (claimed := self._claim(download, chunks)) is not None:
                self._fetch(download, claimed)
        finally:
            with self._changed:
                self._demands -= 1
                self._changed.notify_all()

    def fetch_header(self, path: Path) -> None:
        """Wait for the header of a file. Raises OSError."""
        size = self._downloads[path].file.size
        if path.suffix == ".gguf":
            return self.wait(path, 0, min(size, GGUF_HEADER))
        self.wait(path, 0, min(size, 8))
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        return self.wait(path, 0, min(size, 8 + min(length, MAX_HEADER)))

    def _claim(self, download: _Download, chunks: range, most: int | None = None) -> range | None:
        """The first of ``chunks`` that nobody fetches, at most ``most``, now busy; empty after a wait for the others;
        None if all are here. Raises OSError."""
        file, busy = download.file, download.busy
        with self._changed:
            if file.error is not None:
                raise OSError(file.error)
            if self._closed:
                raise OSError("closed before all bytes arrived")
            first = at = file.have.find(MISSING, chunks.start, chunks.stop)
            while at in busy:
                at = file.have.find(MISSING, at + 1, chunks.stop)
            if first < 0:
                return None
            if at < 0:
                self._changed.wait(TIMEOUT)
                return range(0)
            stop, last = at, chunks.stop if most is None else min(chunks.stop, at + most)
            while stop < last and file.have[stop] == MISSING and stop not in busy:
                stop += 1
            busy.update(range(at, stop))
            return range(at, stop)

    def _fetch(self, download: _Download, chunks: range) -> None:
        """Fetch claimed chunks. Connections that end are replaced. Raises OSError after STALL seconds in vain."""
        at, since = chunks.start, time.monotonic()
        try:
            while at < chunks.stop:
                try:
                    for data in self._receive(download, range(at, chunks.stop)):
                        download.file.store(at, data)
                        at, since = at + 1, time.monotonic()
                        if self._closed:
                            raise OSError("closed")
                except (OSError, http.client.HTTPException) as error:
                    download.location = None  # signed addresses expire
                    with self._changed:
                        if self._closed or time.monotonic() - since > STALL:
                            raise OSError(
                                f"{download.file.name} of {self._staged.repo} does not arrive from the Hub: {error}"
                            ) from error
                        self._changed.wait_for(lambda: self._closed, PAUSE)
        finally:
            with self._changed:
                download.busy.difference_update(chunks)
                self._changed.notify_all()

    def _receive(self, download: _Download, chunks: range) -> Iterator[bytes]:
        """Yield the bytes of ``chunks``. Raises OSError, HTTPException."""
        from huggingface_hub import get_token, hf_hub_url

        file = download.file
        start, stop = file.bounds(chunks[0])[0], file.bounds(chunks[-1])[1]
        hub = hf_hub_url(self._staged.repo, file.name, revision=self._staged.snapshot.name)
        request = urllib.request.Request(
            download.location or hub, headers={"Range": f"bytes={start}-{stop - 1}", "User-Agent": "tierlm"}
        )
        if urlsplit(request.full_url).netloc == urlsplit(hub).netloc and (token := get_token()) is not None:
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # goes to the Hub alone
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            download.location = response.url
            found = response.headers.get("Content-Range", "")
            if response.status != http.client.PARTIAL_CONTENT or not found.startswith(f"bytes {start}-"):
                raise OSError(f"expected bytes {start} to {stop}, the server sent {found or response.status}")
            for begin, end in map(file.bounds, chunks):
                data = response.read(end - begin)
                if len(data) < end - begin:
                    raise OSError(f"the connection ended at byte {begin + len(data)}")
                yield data

    def _fill(self) -> None:
        for download in self._downloads.values():
            file = download.file
            while not file.whole and file.error is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or not self._demands)
                try:
                    if (at := file.have.find(MISSING)) >= 0:
                        self._fetch(download, self._claim(download, range(at, file.count), BATCH) or range(0))
                    elif download.finishing.acquire(blocking=False):
                        try:
                            self._finish(file)
                        finally:
                            download.finishing.release()
                    else:
                        break  # another thread finishes it
                except OSError:  # reads that wait report it
                    with self._changed:
                        if self._changed.wait_for(lambda: self._closed, PAUSE):
                            return

    def _finish(self, file: StagedFile) -> None:
        """Check a complete file, and publish it. Raises OSError."""
        if len(file.etag) == 64 and (found := self._sha256(file.path)) != file.etag:
            file.reject(f"{file.name} arrived with the SHA-256 {found}, expected {file.etag}; load it again")
        else:
            self._staged.publish(file)

    def _sha256(self, path: Path) -> str:
        """Raises OSError, also when closed meanwhile."""
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while data := stream.read(2**22):
                digest.update(data)
                if self._closed:
                    raise OSError("closed")
            os.fsync(stream.fileno())
        return digest.hexdigest()


class ArrivingReader(Reader):
    """Reads what has arrived through ``reader``, and waits for what has not. Owns both."""

    def __init__(self, reader: Reader, arrivals: Arrivals):
        self._reader, self._arrivals, self.name = reader, arrivals, reader.name
        arrivals.start()

    @property
    def arrived(self) -> tuple[int, int]:
        return self._arrivals.progress

    def read(self, request: Request, buffer: memoryview) -> None:
        try:
            self.wait(request.extent.file, request.start, request.stop)
        except OSError as error:
            raise failure(request, request.start, str(error)) from error
        self._reader.read(request, buffer)

    def wait(self, file: Path, start: int, stop: int) -> None:
        self._arrivals.wait(file, start, stop)

    def descriptor(self, file: Path) -> int | None:
        return self._reader.descriptor(file) if self._arrivals.whole(file) else None

    def repair(self, request: Request, buffer: memoryview, check: Callable[[Path], None]) -> None:
        self._reader.repair(request, buffer, check)

    def troubles(self) -> list[str]:
        return self._reader.troubles()

    def close(self) -> None:
        self._arrivals.close()
        self._reader.close()


def fetch_headers(folder: Path) -> None:
    """Wait for the headers of a staged folder's files. Raises OSError, CheckpointError."""
    arrivals = Arrivals(folder)
    try:
        with ThreadPoolExecutor(CONNECTIONS, "tierlm-headers") as pool:
            list(pool.map(arrivals.fetch_header, arrivals.files))
    finally:
        arrivals.close()


def fetch_all(folder: Path) -> None:
    """Fetch what is missing of a staged folder, with a progress bar. Raises OSError, CheckpointError."""
    from huggingface_hub import utils

    arrivals = Arrivals(folder)
    try:
        arrivals.start()
        here, total = arrivals.progress
        since = time.monotonic()
        with cast(Any, utils).tqdm(total=total, initial=here, unit="B", unit_scale=True, desc="weights") as bar:
            while not arrivals.join(PAUSE):
                if (now := arrivals.progress[0]) > here:
                    bar.update(now - here)
                    here, since = now, time.monotonic()
                elif here < total and time.monotonic() - since > STALL:
                    raise OSError(f"nothing arrived for {STALL:.0f} seconds; what is here is kept")
    finally:
        arrivals.close()
