"""The folder of a model whose weights still arrive from the Hub: sparse files of full size, and which chunks are here.

It lies in the Hub's cache, and links to the model's small files. A file that is whole is linked into the cache as the
library would have stored it. No torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tierlm.checkpoints.checkpoint import read_json
from tierlm.errors import CheckpointError
from tierlm.files import write_whole

PLAN = "arriving.json"
CHUNK = 2**20  # bytes; what is here is known by chunks
MISSING, HERE = 0, 1


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. ``etag``: its name among the cache's blobs; of large files, the SHA-256."""

    size: int
    etag: str


class StagedFile:
    """A file of full size. ``name``: in the repository; ``have``: MISSING or HERE for each chunk; ``whole``: it is in
    the Hub's cache; ``error``: why it cannot be used."""

    def __init__(self, path: Path, name: str, size: int, etag: str):
        self.path, self.name, self.size, self.etag = path, name, size, etag
        self.whole = path.is_symlink()
        self.error: str | None = None
        known = _map(path).read_bytes() if _map(path).exists() else b""
        self.have = bytearray(known[: self.count].ljust(self.count, bytes([MISSING])))

    @property
    def count(self) -> int:
        """Of its chunks."""
        return -(-self.size // CHUNK)

    @property
    def here(self) -> int:
        """Bytes that have arrived."""
        return self.size if self.whole else min(self.size, CHUNK * self.have.count(HERE))

    def chunks(self, start: int, stop: int) -> range:
        """The chunks of the bytes ``start`` to ``stop``."""
        return range(start // CHUNK, -(-stop // CHUNK))

    def bounds(self, chunk: int) -> tuple[int, int]:
        """The first byte of ``chunk``, and the first after it."""
        return chunk * CHUNK, min((chunk + 1) * CHUNK, self.size)

    def store(self, chunk: int, data: bytes) -> None:
        """Keep a chunk, for later processes too. Raises OSError."""
        for path, at, part in ((self.path, chunk * CHUNK, data), (_map(self.path), chunk, bytes([HERE]))):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.pwrite(fd, part, at) != len(part):
                    raise OSError(f"{path}: the disk is full")
            finally:
                os.close(fd)
        self.have[chunk] = HERE

    def reject(self, why: str) -> None:
        """Let nobody use the file, and let a later process fetch it again. Raises OSError."""
        _map(self.path).unlink(missing_ok=True)
        self.error = why


class Staged:
    """An open folder made by ``stage``, which nobody discards before ``close``. ``snapshot``: the model's folder in the
    Hub's cache. Raises CheckpointError."""

    def __init__(self, folder: Path):
        plan = read_json(folder / PLAN)
        try:
            self.repo, self.snapshot = str(plan["repo"]), Path(plan["snapshot"])
            paths = {folder / Path(key).name: each for key, each in plan["files"].items()}
            self.files = {
                path: StagedFile(path, each["name"], int(each["size"]), each["etag"]) for path, each in paths.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / PLAN}: is malformed ({error}); remove {folder}") from error
        self._lock = open(folder / PLAN, "rb")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # see discard

    @property
    def cache(self) -> Path:
        """The repository's folder in the Hub's cache."""
        return self.snapshot.parent.parent

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are here, and of all files."""
        files = self.files.values()
        return sum(file.here for file in files), sum(file.size for file in files)

    def publish(self, file: StagedFile) -> None:
        """Link a complete file into the cache. Raises OSError."""
        blob, pointer = self.cache / "blobs" / file.etag, self.snapshot / file.name
        for folder in (blob.parent, pointer.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.link(file.path, blob)
        with suppress(FileExistsError):
            os.symlink(os.path.relpath(blob, pointer.parent), pointer)
        file.whole = True

    def close(self) -> None:
        self._lock.close()


def stage(repo: str, snapshot: Path, files: Mapping[str, HubFile]) -> Path:
    """Make a folder of ``files`` of ``repo``: links to those in ``snapshot``, and for the others room of their size.
    What has arrived in it before stays. Raises OSError."""
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
    return folder


def staged_in(snapshot: Path, files: Collection[str]) -> Path | None:
    """The folder that ``stage`` has made for ``files``, if any."""
    folder = _folder(snapshot, files)
    return folder if (folder / PLAN).exists() else None


def arriving_in(path: Path) -> Path | None:
    """The folder of a model, or of its GGUF file, if its weights still arrive."""
    folder = path if path.is_dir() else path.parent
    return folder if (folder / PLAN).exists() else None


def discard(snapshot: Path, files: Collection[str]) -> None:
    """Remove the folder of files that are all in ``snapshot`` now, unless a process uses it. Raises OSError."""
    if (folder := staged_in(snapshot, files)) is not None:
        with open(folder / PLAN, "rb") as stream, suppress(BlockingIOError):
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
