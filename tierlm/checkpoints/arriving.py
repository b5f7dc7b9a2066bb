"""Weights that still arrive from the Hub: sparse files of full size, whose missing bytes are fetched when read.

They lie in a folder of their own in the Hub's cache, beside links to the model's small files. A file that is whole and
has the right checksum is linked into the cache as the library would have stored it. No torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from tierlm.checkpoints.checkpoint import MAX_HEADER, read_json
from tierlm.checkpoints.reader import Reader, Request, failure
from tierlm.config import format_size
from tierlm.errors import CheckpointError
from tierlm.files import write_whole

PLAN = "arriving.json"
CHUNK = 2**20  # bytes; what is here is known by chunks
BATCH = 16  # chunks of one request in the background: a demand for one of them waits for all before it
STALL = 30.0  # seconds without a chunk before a read fails
TIMEOUT = 10.0  # seconds without a byte before a connection is given up
PAUSE = 0.5  # seconds between attempts
CONNECTIONS = 8  # for headers
FILLERS = 4  # connections in the background
GGUF_HEADER = 32 * 2**20  # bytes; twice that of a vocabulary of 250,000 tokens with merges
MISSING, HERE = 0, 1


@dataclass(frozen=True)
class Arriving:
    """A file of a repository. ``etag``: its name among the cache's blobs; of large files, the SHA-256."""

    size: int
    etag: str


@dataclass(eq=False)
class _File:
    """``have``: MISSING or HERE for each chunk; ``busy``: chunks on their way; ``whole``: nothing is left to do.
    ``location``: where the Hub's address led to; ``error``: why the file cannot be used."""

    path: Path
    name: str
    size: int
    etag: str
    have: bytearray = field(default_factory=bytearray)
    busy: set[int] = field(default_factory=set)
    whole: bool = False
    location: str | None = None
    error: str | None = None
    finishing: threading.Lock = field(default_factory=threading.Lock)


def arrange(repo: str, snapshot: Path, files: Mapping[str, Arriving]) -> Path:
    """A folder for ``files`` of ``repo``, those of ``snapshot`` that are here and the others with only their headers.

    Raises OSError, CheckpointError."""
    folder = _folder(snapshot, files)
    folder.mkdir(parents=True, exist_ok=True)
    for file in snapshot.iterdir() if snapshot.exists() else ():
        if file.is_file() and not (folder / file.name).exists():
            _link(folder / file.name, file)
    plan = {}
    for name, each in files.items():
        path = folder / Path(name).name
        plan[path.name] = {"name": name, "size": each.size, "etag": each.etag}
        if (snapshot / name).exists():
            if not path.is_symlink():
                _link(path, snapshot / name)
        elif not path.exists() or path.stat().st_size != each.size:
            for old in (path, _map(path)):
                old.unlink(missing_ok=True)
            with open(path, "wb") as stream:
                stream.truncate(each.size)
    if not (folder / PLAN).exists():
        write_whole(folder / PLAN, json.dumps({"repo": repo, "snapshot": str(snapshot), "files": plan}))
    arrivals = Arrivals(folder)
    try:
        with ThreadPoolExecutor(CONNECTIONS, "tierlm-headers") as pool:
            list(pool.map(arrivals.fetch_header, arrivals.files))
    finally:
        arrivals.close()
    return folder


def complete(snapshot: Path, files: Collection[str]) -> bool:
    """Fetch the rest of ``files`` into ``snapshot``, with a progress bar, if a part has arrived already; False if none
    has. Raises OSError, CheckpointError."""
    from huggingface_hub import utils

    if arriving_in(folder := _folder(snapshot, files)) is None:
        return False
    arrivals = Arrivals(folder)
    try:
        arrivals.start()
        here, total = arrivals.progress
        since = time.monotonic()
        with cast(Any, utils).tqdm(total=total, initial=here, unit="B", unit_scale=True, desc=snapshot.name[:8]) as bar:
            while not arrivals.join(PAUSE):
                if (now := arrivals.progress[0]) > here:
                    bar.update(now - here)
                    here, since = now, time.monotonic()
                elif here < total and time.monotonic() - since > STALL:
                    raise OSError(f"nothing arrived for {STALL:.0f} seconds; what is here is kept")
    finally:
        arrivals.close()
    return True


def discard(snapshot: Path, files: Collection[str]) -> None:
    """Remove the folder of files that are all in ``snapshot`` now, unless a process uses it. Raises OSError."""
    folder = _folder(snapshot, files)
    if (plan := folder / PLAN).exists():
        with open(plan, "rb") as stream, suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def _link(path: Path, target: Path) -> None:
    """Make ``path`` a link to ``target``, whatever it was."""
    beside = path.with_name(f"{path.name}.link")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, path)


def _map(path: Path) -> Path:
    """The file that remembers which chunks of ``path`` are here."""
    return path.with_name(path.name + ".map")


def _folder(snapshot: Path, files: Collection[str]) -> Path:
    choice = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    return snapshot.parent.parent / "arriving" / snapshot.name / choice


def arriving_in(path: Path) -> Path | None:
    """The folder of a model, or of its GGUF file, if its weights still arrive."""
    folder = path if path.is_dir() else path.parent
    return folder if (folder / PLAN).exists() else None


class Arrivals:
    """The weights of a folder made by ``arrange``. Thread-safe. Raises CheckpointError."""

    def __init__(self, folder: Path):
        plan = read_json(folder / PLAN)
        try:
            self._repo, self._snapshot = str(plan["repo"]), Path(plan["snapshot"])
            self._files = {
                folder / Path(key).name: _File(folder / Path(key).name, each["name"], int(each["size"]), each["etag"])
                for key, each in plan["files"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / PLAN}: is malformed ({error}); remove {folder}") from error
        self._lock = open(folder / PLAN, "rb")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # see discard
        self._changed = threading.Condition()
        self._demands, self._closed = 0, False
        self._threads: list[threading.Thread] = []
        for file in self._files.values():
            file.whole = file.path.is_symlink()  # it was in the cache
            count = -(-file.size // CHUNK)
            known = _map(file.path).read_bytes() if _map(file.path).exists() else b""
            file.have = bytearray(known[:count].ljust(count, bytes([MISSING])))

    @property
    def files(self) -> list[Path]:
        return list(self._files)

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are here, and of all files."""
        files = self._files.values()
        here = sum(file.size if file.whole else min(file.size, CHUNK * file.have.count(HERE)) for file in files)
        return here, sum(file.size for file in files)

    def whole(self, path: Path) -> bool:
        """Whether a read of ``path`` never waits."""
        return path not in self._files or self._files[path].whole

    def start(self) -> None:
        """Fetch what no read asks for, in the order of the files, behind what reads wait for. Raises OSError if the
        disk has too little room."""
        here, total = self.progress
        if (free := shutil.disk_usage(self._snapshot.parent.parent).free) < total - here:
            self.close()
            raise OSError(
                f"{self._snapshot.parent.parent}: {format_size(total - here)} are still to arrive from the Hub, "
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
        if damaged := [file.error for file in self._files.values() if file.error is not None]:
            raise OSError(damaged[0])
        return all(file.whole for file in self._files.values())

    def close(self) -> None:
        """Stop. What is here stays for the next time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(TIMEOUT)
        self._lock.close()

    def wait(self, path: Path, start: int, stop: int) -> None:
        """Return once the bytes ``start`` to ``stop`` of ``path`` are here, fetching them ahead of all others. Raises
        OSError after STALL seconds without progress."""
        if self.whole(path):
            return
        file, chunks = self._files[path], range(start // CHUNK, -(-stop // CHUNK))
        with self._changed:
            self._demands += 1
        try:
            while (claimed := self._claim(file, chunks)) is not None:
                self._fetch(file, claimed)
        finally:
            with self._changed:
                self._demands -= 1
                self._changed.notify_all()

    def fetch_header(self, path: Path) -> None:
        """Wait for the header of a file. Raises OSError."""
        size = self._files[path].size
        if path.suffix == ".gguf":
            return self.wait(path, 0, min(size, GGUF_HEADER))
        self.wait(path, 0, min(size, 8))
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        return self.wait(path, 0, min(size, 8 + min(length, MAX_HEADER)))

    def _claim(self, file: _File, chunks: range, most: int | None = None) -> range | None:
        """The first of ``chunks`` that nobody fetches, at most ``most``, now busy; empty after a wait for the others;
        None if all are here. Raises OSError."""
        with self._changed:
            if file.error is not None:
                raise OSError(file.error)
            if self._closed:
                raise OSError("closed before all bytes arrived")
            first = at = file.have.find(MISSING, chunks.start, chunks.stop)
            while at in file.busy:
                at = file.have.find(MISSING, at + 1, chunks.stop)
            if first < 0:
                return None
            if at < 0:
                self._changed.wait(TIMEOUT)
                return range(0)
            stop, last = at, chunks.stop if most is None else min(chunks.stop, at + most)
            while stop < last and file.have[stop] == MISSING and stop not in file.busy:
                stop += 1
            file.busy.update(range(at, stop))
            return range(at, stop)

    def _fetch(self, file: _File, chunks: range) -> None:
        """Fetch claimed chunks. Connections that end are replaced. Raises OSError after STALL seconds in vain."""
        at, since = chunks.start, time.monotonic()
        try:
            while at < chunks.stop:
                try:
                    for data in self._receive(file, at * CHUNK, min(chunks.stop * CHUNK, file.size)):
                        self._store(file, at, data)
                        at, since = at + 1, time.monotonic()
                        if self._closed:
                            raise OSError("closed")
                except (OSError, http.client.HTTPException) as error:
                    file.location = None  # signed addresses expire
                    with self._changed:
                        if self._closed or time.monotonic() - since > STALL:
                            raise OSError(
                                f"{file.name} of {self._repo} does not arrive from the Hub: {error}"
                            ) from error
                        self._changed.wait_for(lambda: self._closed, PAUSE)
        finally:
            with self._changed:
                file.busy.difference_update(chunks)
                self._changed.notify_all()

    def _receive(self, file: _File, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``start`` to ``stop`` in chunks. Raises OSError, HTTPException."""
        from huggingface_hub import get_token, hf_hub_url

        hub = hf_hub_url(self._repo, file.name, revision=self._snapshot.name)
        request = urllib.request.Request(
            file.location or hub, headers={"Range": f"bytes={start}-{stop - 1}", "User-Agent": "tierlm"}
        )
        if urlsplit(request.full_url).netloc == urlsplit(hub).netloc and (token := get_token()) is not None:
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # goes to the Hub alone
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            file.location = response.url
            found = response.headers.get("Content-Range", "")
            if response.status != http.client.PARTIAL_CONTENT or not found.startswith(f"bytes {start}-"):
                raise OSError(f"expected bytes {start} to {stop}, the server sent {found or response.status}")
            for at in range(start, stop, CHUNK):
                data = response.read(min(CHUNK, stop - at))
                if len(data) < min(CHUNK, stop - at):
                    raise OSError(f"the connection ended at byte {at + len(data)}")
                yield data

    def _store(self, file: _File, chunk: int, data: bytes) -> None:
        for path, at, part in ((file.path, chunk * CHUNK, data), (_map(file.path), chunk, bytes([HERE]))):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.pwrite(fd, part, at) != len(part):
                    raise OSError(f"{path}: the disk is full")
            finally:
                os.close(fd)
        file.have[chunk] = HERE

    def _fill(self) -> None:
        for file in self._files.values():
            while not file.whole and file.error is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or not self._demands)
                try:
                    if (at := file.have.find(MISSING)) >= 0:
                        self._fetch(file, self._claim(file, range(at, len(file.have)), BATCH) or range(0))
                    elif file.finishing.acquire(blocking=False):
                        try:
                            self._finish(file)
                        finally:
                            file.finishing.release()
                    else:
                        break  # another thread finishes it
                except OSError:  # reads that wait report it
                    with self._changed:
                        if self._changed.wait_for(lambda: self._closed, PAUSE):
                            return

    def _finish(self, file: _File) -> None:
        """Check a complete file, and link it into the cache. Raises OSError."""
        if len(file.etag) == 64 and (found := self._sha256(file.path)) != file.etag:
            _map(file.path).unlink(missing_ok=True)
            file.error = f"{file.name} arrived with the SHA-256 {found}, expected {file.etag}; load it again"
            return
        blob, pointer = self._snapshot.parent.parent / "blobs" / file.etag, self._snapshot / file.name
        for folder in (blob.parent, pointer.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(file.path, blob)
        with suppress(FileExistsError):
            os.symlink(os.path.relpath(blob, pointer.parent), pointer)
        file.whole = True

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
