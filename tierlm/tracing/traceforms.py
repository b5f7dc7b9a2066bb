"""Traces of other tools: JSON lines, plain npz, and libCacheSim's oracleGeneral."""

from __future__ import annotations

import json
import os
import zipfile
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError, UsageError, shown
from tierlm.files import open_regular, whole
from tierlm.tracing.trace import BLOCK, MAX_EXPERTS, Ids, Trace, TraceInfo
from tierlm.tracing.tracefile import HEAD, Array, check_unpacked, read_member, read_own, write_trace

ORACLE = np.dtype([("time", "<u4"), ("object", "<u8"), ("bytes", "<u4"), ("next", "<i8")])
FORMS = ("tierlm", "jsonl", "npz", "oracle")


def read_trace(file: Path, *, scores: bool = False) -> Trace:
    """The trace in ``file``: tierlm's own, JSON lines or npz, detected by content. ``scores``: with the optional parts.
    Raises TraceError with the line or offset."""
    try:
        with open(open_regular(file), "rb") as stream:
            start = stream.read(4)
            if not start:
                raise TraceError(f"{file}: the file is empty")
            if start[:2] != b"PK":
                stream.seek(0)
                return _read_jsonl(stream, file)
            with zipfile.ZipFile(stream) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
                check_unpacked(str(file), unpacked, stream.seek(0, os.SEEK_END))
                if HEAD in archive.namelist():
                    return read_own(archive, str(file), scores)
                return _read_npz(archive, file)
    except zipfile.BadZipFile as error:
        size = file.stat().st_size
        raise TraceError(f"{file}: {error}: truncated at offset {size}, or damaged") from error
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror or error}") from error


def _read_jsonl(stream: Iterable[bytes], file: Path) -> Trace:
    """One line a token: ``{"layers": [[experts of the first MoE layer], ...]}``; ``seq``, ``step`` and ``prefill`` are
    optional, other keys ignored."""
    flat, counts = array("h"), array("h")  # all ids; their number by token and layer
    marks: list[tuple[int, int, bool]] = []
    width = size = 0  # layers; bytes
    for number, line in enumerate(stream, 1):
        size += len(line)
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            token = json.loads(line)
            layers = token["layers"]
            mark = (token.get("seq", 0), token.get("step", number), token.get("prefill", False))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TraceError(f'{where}: expected {{"layers": [[expert, ...], ...]}}: {error!r}: truncated?') from error
        if not isinstance(layers, list) or not all(isinstance(ids, list) for ids in layers):
            raise TraceError(f"{where}: expected a list of experts for each layer, found {shown(layers)}")
        if marks and len(layers) != width:
            raise TraceError(f"{where}: expected {width} layers as in earlier lines, found {len(layers)}")
        for layer, ids in enumerate(layers):
            for expert in ids:
                if type(expert) is not int or not 0 <= expert < MAX_EXPERTS:
                    expected = f"expected experts 0 to {MAX_EXPERTS - 1}"
                    raise TraceError(f"{where}, MoE layer {layer}: {expected}, found {shown(expert)}")
            if len(set(ids)) < len(ids):
                raise TraceError(f"{where}, MoE layer {layer}: an expert occurs twice")
            flat.extend(ids)
            counts.append(len(ids))
        if [type(part) for part in mark] != [int, int, bool] or not all(0 <= part < 2**31 for part in mark):
            raise TraceError(
                f"{where}: expected integers for seq and step and a boolean for prefill, found {shown(mark)}"
            )
        width = len(layers)
        marks.append(mark)
    if not flat:
        raise TraceError(f"{file}: the trace is empty: expected one line of experts a token")
    chosen = np.array(counts).reshape(-1, width)
    check_unpacked(str(file), 2 * chosen.size * int(chosen.max()), size)
    experts = np.full((*chosen.shape, chosen.max()), -1, np.int16)
    experts[np.arange(experts.shape[2]) < chosen[..., None]] = flat
    sequences, steps, prefill = (np.array(part) for part in zip(*marks, strict=True))
    return _trace(file, experts, sequences, steps, prefill)


def _read_npz(archive: zipfile.ZipFile, file: Path) -> Trace:
    """``experts``: integers [tokens, layers, k]. Optional: ``offsets``, the first token of each sequence, and the end;
    ``num_experts``, of a layer. Other arrays are ignored."""
    ids = read_member(archive, "experts.npy", str(file))
    if ids.dtype.kind not in "iu" or ids.ndim != 3 or not ids.size:
        raise TraceError(f"{file}: experts: expected integers [tokens, layers, k], found {ids.dtype} {ids.shape}")
    tokens, bound, cuts = len(ids), MAX_EXPERTS, np.array([0, len(ids)])
    if "num_experts.npy" in archive.namelist():
        given = read_member(archive, "num_experts.npy", str(file))
        if given.dtype.kind not in "iu" or given.size != 1 or not 1 <= given.item() <= MAX_EXPERTS:
            raise TraceError(f"{file}: num_experts: expected 1 to {MAX_EXPERTS}, found {shown(given.tolist())}")
        bound = given.item()
    if "offsets.npy" in archive.namelist():
        cuts = read_member(archive, "offsets.npy", str(file))
    for start in range(0, tokens, BLOCK):
        block = ids[start : start + BLOCK]
        if block.min() < 0 or block.max() >= bound:
            token, layer, choice = (int(i) for i in np.argwhere((block < 0) | (block >= bound))[0])
            raise TraceError(
                f"{file}: token {start + token}, layer {layer}: expected experts 0 to {bound - 1}, "
                f"found {block[token, layer, choice]}"
            )
    if cuts.dtype.kind not in "iu" or cuts.ndim != 1 or len(cuts) < 2:
        raise TraceError(f"{file}: offsets: expected integers [sequences + 1], found {cuts.dtype} {cuts.shape}")
    if cuts[0] != 0 or cuts[-1] != tokens:
        raise TraceError(f"{file}: offsets: expected 0 to {tokens}, found {cuts[0]} to {cuts[-1]}")
    falls = np.flatnonzero(cuts[1:] < cuts[:-1])
    if len(falls):
        at = int(falls[0])
        raise TraceError(f"{file}: offsets: expected ascending, found {cuts[at + 1]} at {at + 1} after {cuts[at]}")
    sequences = np.searchsorted(cuts[1:], np.arange(tokens), side="right")
    trace = _trace(file, ids.astype(np.int16), sequences, np.arange(tokens), np.zeros(tokens, bool))
    return trace if bound == MAX_EXPERTS else replace(trace, info=replace(trace.info, experts=bound))


def _trace(file: Path, experts: Ids, sequences: Array, steps: Array, prefill: Array) -> Trace:
    """A trace from a file that does not name its model."""
    info = TraceInfo(file.stem, experts.shape[1], tuple(range(experts.shape[1])), int(experts.max()) + 1)
    try:
        return Trace(info, experts, sequences.astype(np.int32), steps.astype(np.int32), prefill.astype(bool))
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from error


def convert(trace: Trace, file: Path, form: str) -> None:
    """Write ``trace`` in one of FORMS. Raises UsageError if the form cannot hold it, and OSError."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}; known are {', '.join(FORMS)}")
    {"tierlm": write_trace, "jsonl": _write_jsonl, "npz": _write_npz, "oracle": _write_oracle}[form](file, trace)


def _write_jsonl(file: Path, trace: Trace) -> None:
    """Ids ascend within a layer; ``seq``, ``step`` and ``prefill`` are written too."""
    with whole(file) as stream:
        for token in range(len(trace)):
            layers = [sorted(expert for expert in ids if expert >= 0) for ids in trace.experts[token].tolist()]
            marks = {"seq": int(trace.sequences[token]), "step": int(trace.steps[token])}
            line = {"tok": token, **marks, "prefill": bool(trace.prefill[token]), "layers": layers}
            stream.write(json.dumps(line).encode() + b"\n")


def _write_npz(file: Path, trace: Trace) -> None:
    """Tokens by sequence, without steps and phases."""
    if (trace.experts < 0).any():
        raise UsageError("npz: expected the same number of experts for each token, found different ones")
    order = np.argsort(trace.sequences, kind="stable")
    lengths = np.unique(trace.sequences, return_counts=True)[1]
    offsets, count = np.concatenate([[0], np.cumsum(lengths)]), np.array(trace.info.experts)
    with whole(file) as stream:
        np.savez_compressed(stream, experts=trace.experts[order], offsets=offsets, num_experts=count)


def _write_oracle(file: Path, trace: Trace) -> None:
    """libCacheSim's oracleGeneral: one request for each record of a step, 24 bytes little-endian: uint32 time (step),
    uint64 object (MoE layer x experts + expert), uint32 bytes, int64 number of its next request, -1: none.
    As in libCacheSim/traceReader/customizedReader/oracle/oracleGeneralBin.h."""
    experts, requests, steps = trace.info.experts, array("q"), array("q")
    for number, step in enumerate(trace.passes()):
        for layer, needed in enumerate(step.needed):
            requests.extend(layer * experts + expert for expert in needed)
            steps.extend([number] * len(needed))
    rows = np.zeros(len(requests), ORACLE)
    rows["time"], rows["object"], rows["bytes"] = steps, requests, trace.info.record_bytes or 1
    rows["next"] = next_uses(np.array(requests))
    with whole(file) as stream:
        stream.write(rows.tobytes())


def next_uses(requests: Array) -> npt.NDArray[np.int64]:
    """int64 [n], for each request the number of the next one for the same object, -1: none."""
    order = np.argsort(requests, kind="stable")
    following = np.full(len(requests), -1, np.int64)
    same = requests[order[1:]] == requests[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following
