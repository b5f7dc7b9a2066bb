"""tierlm's own trace file: a zip of numpy arrays (npz), written atomically, in blocks, with bounded memory.

Members: for each block b of tokens ``b/experts.npy``, ``b/sequences.npy``, ``b/steps.npy``, ``b/prefill.npy``, on
request ``b/scores.npy`` and ``b/predictions.npy``, shapes and dtypes as in ``tracing.trace.Trace``; last
``trace.json``: format, version, tokens, blocks, and the fields of TraceInfo. ``numpy.load`` opens it too.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError, shown
from tierlm.files import whole
from tierlm.tracing.trace import BLOCK, Trace, TraceInfo

FORMAT, VERSION = "tierlm-trace", 2
BLOCK_BYTES = 4 * 2**20  # buffered before a write, plus at most one step
HEAD = "trace.json"
DTYPES = {"experts": "<i2", "sequences": "<i4", "steps": "<i4", "prefill": "|b1", "scores": "<f2", "predictions": "<i2"}
OPTIONAL = ("scores", "predictions")

Array = npt.NDArray[Any]


class TraceWriter:
    """Writes ``file``, which exists once ``close`` has returned. Raises OSError, then again at each ``add``."""

    def __init__(self, file: Path, info: TraceInfo):
        self.file, self.info = file, info
        self._failed: OSError | None = None
        self.tokens = 0
        self._pending: list[dict[str, Array]] = []
        self._blocks = self._waiting = 0
        self._open = ExitStack()
        self._zip = zipfile.ZipFile(self._open.enter_context(whole(file)), "w", zipfile.ZIP_DEFLATED)

    def add(self, **parts: Array) -> None:
        """Append tokens: the arrays of a Trace, with the same optional ones in each call."""
        self._pending.append(parts)
        self._waiting += sum(rows.nbytes for rows in parts.values())
        if self._waiting >= BLOCK_BYTES:
            self._flush()

    def close(self) -> None:
        """Complete the file. A trace without tokens, or after an error, is not written."""
        if self._failed is not None:
            return
        if self._waiting:
            self._flush()
        if not self.tokens:
            self.drop()
            return
        head = {"format": FORMAT, "version": VERSION, "tokens": self.tokens, "blocks": self._blocks}
        with self._dropped_on_error(), self._open, self._zip as archive:
            archive.writestr(HEAD, json.dumps(head | asdict(self.info)))

    def drop(self) -> None:
        """Discard the file. Never raises."""
        self._pending = []
        self._zip.fp = None  # so that zipfile completes nothing, now or when it is collected
        with suppress(_Dropped, OSError), self._open:
            raise _Dropped

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.file)
            self._failed = error
            self.drop()
            raise

    def _flush(self) -> None:
        if self._failed is not None:
            raise self._failed
        with self._dropped_on_error():
            for name in self._pending[0]:
                rows = np.concatenate([parts[name] for parts in self._pending]).astype(DTYPES[name])
                with self._zip.open(f"{self._blocks}/{name}.npy", "w") as member:
                    np.lib.format.write_array(member, rows, allow_pickle=False)
        self.tokens += sum(len(parts["experts"]) for parts in self._pending)
        self._blocks += 1
        self._pending, self._waiting = [], 0


class _Dropped(Exception):
    """Makes ``whole`` discard the file."""


def write_trace(file: Path, trace: Trace) -> None:
    """Write ``trace`` to ``file``. Raises OSError."""
    writer = TraceWriter(file, trace.info)
    for start in range(0, len(trace), BLOCK):
        parts = {name: getattr(trace, name) for name in DTYPES}
        writer.add(**{name: part[start : start + BLOCK] for name, part in parts.items() if part is not None})
    writer.close()


def read_own(archive: zipfile.ZipFile, where: str, scores: bool) -> Trace:
    """The trace in an open file; ``scores``: with the optional parts. Raises TraceError."""
    try:
        with archive.open(HEAD) as stream:
            head: Any = json.loads(stream.read(archive.getinfo(HEAD).file_size))
        if head["format"] != FORMAT or head["version"] != VERSION:
            raise TraceError(
                f"{where}: expected {FORMAT} version {VERSION}, found {shown(head['format'])} version "
                f"{shown(head['version'])}: read it with the version of tierlm that wrote it"
            )
        tokens, blocks = int(head["tokens"]), int(head["blocks"])
        order = tuple(tuple(int(expert) for expert in row) for row in head["order"])
        moe_layers = tuple(int(layer) for layer in head["moe_layers"])
        layers, experts, record = (int(head[name]) for name in ("layers", "experts", "record_bytes"))
        info = TraceInfo(str(head["model"]), layers, moe_layers, experts, record, order)
    except (KeyError, ValueError, TypeError, OverflowError, *BROKEN) as error:
        raise TraceError(f"{where}: {HEAD}: not a trace head: {error!r}") from error
    found: dict[str, list[Array]] = {}
    for block in range(blocks):
        for name, dtype in DTYPES.items():
            member = f"{block}/{name}.npy"
            if name in OPTIONAL and (not scores or member not in archive.namelist()):
                continue
            rows = read_member(archive, member, where)
            if rows.dtype != np.dtype(dtype):
                raise TraceError(f"{where}: {member}: expected {np.dtype(dtype)}, found {rows.dtype}")
            found.setdefault(name, []).append(rows)
    try:
        joined: dict[str, Any] = {name: np.concatenate(rows) for name, rows in found.items()}
        if len(joined.get("experts", ())) != tokens or joined["experts"].ndim != 3:
            raise ValueError(f"expected {tokens} tokens x layers x k, found {joined['experts'].shape}")
        return Trace(info, **joined)
    except (KeyError, ValueError, TypeError, TraceError) as error:
        raise TraceError(f"{where}: {error}") from error


BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
SMALL, RATIO = 32 * 2**20, 32  # bytes that any trace may unpack to; and for each byte of its file


def check_unpacked(where: str, size: int, packed: int) -> None:
    """Raises TraceError if ``size`` bytes are more than the file ``where`` of ``packed`` bytes may take in memory."""
    if size > SMALL + RATIO * packed:
        raise TraceError(
            f"{where}: expected at most {SMALL + RATIO * packed} bytes of arrays in a file of {packed}, found {size}"
        )


def read_member(archive: zipfile.ZipFile, name: str, where: str) -> Array:
    """A numeric array of an open npz; its header is checked against its size before any allocation, and no more is
    read, whatever the zip holds. Raises TraceError."""
    try:
        size = archive.getinfo(name).file_size
        with archive.open(name) as member:
            shape, fortran, dtype = _header(member)
            count = int(np.prod(shape, dtype=object)) if shape else 1
            if dtype.kind not in "iufb" or fortran or count * dtype.itemsize != size - member.tell():
                raise ValueError(f"expected numbers in {size - member.tell()} bytes, found {shape} of {dtype}")
            return np.frombuffer(member.read(count * dtype.itemsize), dtype).reshape(shape)
    except KeyError:
        raise TraceError(f"{where}: expected an array {name.removesuffix('.npy')!r}, found none") from None
    except (ValueError, TypeError, OverflowError, *BROKEN) as error:
        at = archive.getinfo(name).header_offset
        raise TraceError(f"{where}: {name}, at offset {at}: {error}: truncated or damaged") from error


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(member)
    except Exception as error:  # it is parsed as Python, with any error of a parser
        raise ValueError(str(error)) from error
