"""Copies of a model's files on several disks: each request goes to the disk that finishes it first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache, together
from tierlm.checkpoints.probe import find_profile
from tierlm.checkpoints.reader import Reader, Request, open_reader
from tierlm.errors import CheckpointError, StorageError, UsageError
from tierlm.files import Stamp, open_regular


@dataclass(eq=False)
class Volume:
    """One file system with files of the model. ``speed``: relative to the others; ``in_flight``, ``total``: bytes
    requested now, and since the start."""

    reader: Reader
    speed: float = 1.0
    in_flight: int = 0
    total: int = 0


@dataclass(eq=False)
class Copy:
    """One copy of a file. ``failure``: its first failed read; a failed copy is tried last."""

    file: Path
    volume: Volume
    failure: StorageError | None = None


class MirrorReader(Reader):
    """Reads each request from one copy of its file; a failed read is retried on the other copies, a hung one is not.

    ``copies``: by the file that requests name.
    """

    def __init__(self, copies: Mapping[Path, Sequence[Copy]]):
        self._copies = copies
        self._readers = {copy.volume.reader for each in copies.values() for copy in each}
        self._lock = threading.Lock()
        self.name = "+".join(sorted({reader.name for reader in self._readers}))

    def read(self, request: Request, buffer: memoryview) -> None:
        def read(copy: Copy) -> None:
            copy.volume.reader.read(_of(copy.file, request), buffer)

        self._from_a_copy(request.extent.file, len(buffer), read)

    def repair(self, request: Request, buffer: memoryview, check: Callable[[Path], None]) -> None:
        def read(copy: Copy) -> None:
            copy.volume.reader.read(_of(copy.file, request), buffer)
            check(copy.file)

        self._from_a_copy(request.extent.file, len(buffer), read)

    def _from_a_copy(self, file: Path, nbytes: int, read: Callable[[Copy], None]) -> None:
        """Read ``nbytes`` from the best copy of ``file``, then the next. Raises StorageError if all fail."""
        left, errors = list(self._copies[file]), list[StorageError]()
        while left:
            copy = self._begin(left, nbytes)
            left.remove(copy)
            try:
                return read(copy)
            except StorageError as error:
                errors.append(error)
                copy.failure = copy.failure or error
            finally:
                with self._lock:
                    copy.volume.in_flight -= nbytes
        first = errors[0]
        message = "; ".join(map(str, errors))
        raise StorageError(message, file=first.file, tensor=first.tensor, offset=first.offset) from first

    def _begin(self, copies: Sequence[Copy], nbytes: int) -> Copy:
        """Choose a copy: one that never failed, then the earliest finish, then the least-used disk."""

        def rank(copy: Copy) -> tuple[bool, float, float]:
            volume = copy.volume
            seconds = (volume.in_flight + nbytes) / volume.speed
            return copy.failure is not None, seconds, volume.total / volume.speed

        with self._lock:
            chosen = min(copies, key=rank)
            chosen.volume.in_flight += nbytes
            chosen.volume.total += nbytes
        return chosen

    def troubles(self) -> list[str]:
        failed = [copy for each in self._copies.values() if len(each) > 1 for copy in each if copy.failure is not None]
        return [f"a copy failed, other copies of the file are read first: {copy.failure}" for copy in failed]

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def open_disks(
    files: Sequence[Path],
    mirrors: Sequence[Path],
    reader: str,
    probe: str,
    cache: ProfileCache,
    stamps: Mapping[Path, Stamp],
) -> tuple[Reader, DiskProfile, list[str]]:
    """A reader of ``files`` and their copies in the folders ``mirrors``, the combined disk profile, and notes.

    ``stamps``: of the files to compare with it, when their headers were read. Each file system gets its own reader
    (``open_reader``) and profile (``find_profile``). Raises UsageError and CheckpointError; an error leaves no file
    open.
    """
    copies = find_copies(files, mirrors)
    stamps = {copy: stamps.get(copy) or Stamp.of(copy) for file in stamps for copy in copies[file]}
    disks: dict[int, list[Path]] = {}
    for file in (copy for each in copies.values() for copy in each):
        disks.setdefault(os.stat(file).st_dev, []).append(file)
    readers: list[Reader] = []
    profiles: list[DiskProfile] = []
    notes: list[str] = []
    try:
        for held in disks.values():
            opened, why = open_reader(reader, held, stamps)
            readers.append(opened)
            own, note = find_profile(opened, held, probe, cache)
            profiles.append(own)
            notes += [f"reader {why}", note]
    except BaseException:
        for opened in readers:
            opened.close()
        raise
    profile = together(profiles)
    if len(readers) == 1 and not mirrors:
        return readers[0], profile, notes
    volume_of: dict[Path, Volume] = {}
    for held, opened, own in zip(disks.values(), readers, profiles, strict=True):
        measured = profile.bytes_per_second is not None  # of every disk; else all count as equal
        volume_of |= dict.fromkeys(held, Volume(opened, own.bytes_per_second or 1.0 if measured else 1.0))
    return (
        MirrorReader({file: [Copy(copy, volume_of[copy]) for copy in each] for file, each in copies.items()}),
        profile,
        notes,
    )


def find_copies(files: Iterable[Path], mirrors: Iterable[Path]) -> dict[Path, list[Path]]:
    """Each of ``files`` with its copies, itself first: files of the same name, size and header in ``mirrors``.

    Tensor data is not compared. Raises UsageError for a folder without copies, CheckpointError for a file that differs.
    """
    copies = {file: [file] for file in files}
    for folder in mirrors:
        if not folder.is_dir():
            raise UsageError(f"mirror {folder}: expected a folder, found {'a file' if folder.exists() else 'nothing'}")
        found = False
        for file, known in copies.items():
            copy = folder / file.name
            if copy.exists() and not any(copy.samefile(other) for other in known):
                _check_copy(file, copy)
                known.append(copy)
                found = True
        if not found:
            names = ", ".join(sorted(file.name for file in copies)[:3])
            raise UsageError(f"mirror {folder}: expected other copies of the model's files ({names}, ...), found none")
    return copies


def _check_copy(file: Path, copy: Path) -> None:
    try:
        size, found = os.path.getsize(file), os.path.getsize(copy)
        if size != found:
            raise CheckpointError(f"{copy}: expected {size} bytes as in {file}, found {found}; copy it again")
        if _header(file) != _header(copy):
            raise CheckpointError(f"{copy}: its safetensors header differs from that of {file}; copy it again")
    except OSError as error:
        raise CheckpointError(f"{copy}: expected a readable copy of {file}: {error.strerror or error}") from error


def _header(file: Path) -> bytes:
    with open(open_regular(file), "rb") as stream:
        prefix = stream.read(8)
        return prefix + stream.read(min(int.from_bytes(prefix, "little"), os.fstat(stream.fileno()).st_size))


def _of(file: Path, request: Request) -> Request:
    """``request``, addressed to the copy ``file``."""
    return request if file == request.extent.file else replace(request, extent=replace(request.extent, file=file))
