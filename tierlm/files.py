"""Files of others are read only if they are regular, and compared with what was known of them; our own are written
completely or not at all. And the user's cache folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_READ = 128 * 2**20  # bytes; the largest tokenizers have 35 MB
BESIDE = ".tierlm-"  # begins the name of a file that is about to take its place
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


class Stamp(NamedTuple):
    """What tells a file from its replacement without reading it."""

    size: int
    modified_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: int | Path) -> Stamp:
        """The stamp of a file or of a descriptor. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


def is_folder(path: Path) -> bool:
    """``path.is_dir()``, but false for a name that no file can have. Raises OSError if it cannot be looked at."""
    return _look(path.is_dir)


def is_file(path: Path) -> bool:
    """``path.is_file()``, in the same way."""
    return _look(path.is_file)


def _look(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def open_regular(file: Path, flags: int = 0, expected: Stamp | None = None) -> int:
    """Open ``file`` for reading; ``flags``: of os.open, besides. Returns the descriptor.

    Raises OSError, also if it is not a regular file (a FIFO or a device would be waited for), or not the file that had
    the stamp ``expected``.
    """
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            found = KINDS.get(stat.S_IFMT(mode), "a device")
            raise OSError(errno.EINVAL, f"expected a regular file, found {found}", str(file))
        if expected is not None and (change := changed(fd, expected)):
            raise OSError(errno.ESTALE, change, str(file))
    except BaseException:
        os.close(fd)
        raise
    return fd


def changed(fd: int, expected: Stamp) -> str:
    """How an open file differs from the one that had the stamp ``expected``, in words; "" if it does not."""
    found = Stamp.of(fd)
    if found == expected:
        return ""
    what = ", ".join(
        f"{name.removesuffix('_ns')} {then} before, {now} now"
        for name, then, now in zip(Stamp._fields, expected, found, strict=True)
        if then != now
    )
    return f"the file was changed or replaced since its header was read ({what})"


def read_regular(file: Path, limit: int = MAX_READ) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises OSError."""
    with open(open_regular(file), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"expected at most {limit} bytes, found {size}", str(file))
        return stream.read(size)


@contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """A stream to a temporary file that is synced and takes the place of ``file`` after the ``with`` block: a reader
    finds the old file or the new. An error leaves the old one. If the file system has files without names (ext4, xfs,
    btrfs, tmpfs do), a kill leaves nothing else, unless it comes between the two calls that name the new file and put
    it in its place; the next file written to that folder removes what is left then. Raises OSError, which names
    ``file``."""
    beside = None
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "expected a regular file, or none")
        target = Path(os.path.realpath(file))  # a link stays a link
        target.parent.mkdir(parents=True, exist_ok=True)
        name = target.with_name(f"{BESIDE}{os.urandom(8).hex()}")
        fd = _nameless(target.parent)
        if fd is None:
            beside = name
            fd = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        with open(fd, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(fd)
            if beside is None:
                with suppress(OSError):  # where there are no locks, nothing is swept
                    fcntl.flock(fd, fcntl.LOCK_EX)  # while it has a name of its own
                os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd)  # any src_dir_fd makes Python follow the link
                beside = name
                os.replace(beside, target)
                _sweep(target.parent)
            else:
                os.replace(beside, target)
    except BaseException as error:
        if beside is not None:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(file), None
        raise


def _sweep(folder: Path) -> None:
    """Remove files that killed processes left in ``folder``: nobody locks them."""
    for left in folder.glob(f"{BESIDE}*"):
        with suppress(OSError), open(open_regular(left), "rb") as stream:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _nameless(folder: Path) -> int | None:
    """Open a new file without a name in ``folder``; None if the file system has none."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError:
        return None
    if os.path.exists(f"/proc/self/fd/{fd}"):  # needed to name it
        return fd
    os.close(fd)
    return None


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` to ``file`` atomically. Raises OSError."""
    with whole(file) as stream:
        stream.write(text.encode("utf-8"))


def user_cache() -> Path | None:
    """tierlm's folder in the user's cache folder; None if the user has no home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the XDG specification ignores relative paths
        return Path(chosen) / "tierlm"
    try:
        return Path.home() / ".cache" / "tierlm"
    except RuntimeError:
        return None
