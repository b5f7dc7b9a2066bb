"""Traces of other tools: a line of JSON a token, plain npz, and libCacheSim's oracleGeneral."""

from __future__ import annotations

import json
import zipfile
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tierlm.errors import TraceError, UsageError
from tierlm.files import whole
from tierlm.tracing.trace import BLOCK, MAX_EXPERTS, Ids, Trace, TraceInfo
from tierlm.tracing.tracefile import HEAD, Array, read_member, read_own, write_trace

ORACLE = np.dtype([("time", "<u4"), ("object", "<u8"), ("bytes", "<u4"), ("next", "<i8")])
FORMS = ("tierlm", "jsonl", "npz", "oracle")


def read_trace(file: Path, *, scores: bool = False) -> Trace:
    """The trace in ``file``: of tierlm's own format, lines of JSON, or npz; told by what is in it.

    ``scores``: also what was recorded on request, if it was. Raises TraceError, with the line or the offset.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(4)
            if not start:
                raise TraceError(f"{file}: is empty")
            if start[:2] != b"PK":
                stream.seek(0)
                return _read_jsonl(stream, file)
        with zipfile.ZipFile(file) as archive:
            if HEAD in archive.namelist():
                return read_own(archive, str(file), scores)
            return _read_npz(archive, file)
    except zipfile.BadZipFile as error:
        size = file.stat().st_size
        raise TraceError(f"{file}: {error}: cut off at offset {size}, or damaged") from error
    except OSError as error:
        raise TraceError(f"{file}: {error.strerror or error}") from error


def _read_jsonl(stream: Iterable[bytes], file: Path) -> Trace:
    """A line a token, ``{"layers": [[experts of the first MoE layer], ...]}``; ``seq``, ``step`` and ``prefill`` are
    used where they stand, anything else is not."""
    flat, counts = array("h"), array("h")  # all ids, and how many each layer of each token has
    marks: list[tuple[int, int, bool]] = []
    width = 0  # layers
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            token = json.loads(line)
            layers = token["layers"]
            mark = (token.get("seq", 0), token.get("step", number), token.get("prefill", False))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TraceError(f'{where}: expected {{"layers": [[expert, ...], ...]}}: {error!r}: cut off?') from error
        if not isinstance(layers, list) or not all(isinstance(ids, list) for ids in layers):
            raise TraceError(f"{where}: expected a list of experts for each layer, found {str(layers)[:60]}")
        if marks and len(layers) != width:
            raise TraceError(f"{where}: expected {width} layers as in the lines before, found {len(layers)}")
        for layer, ids in enumerate(layers):
            for expert in ids:
                if type(expert) is not int or not 0 <= expert < MAX_EXPERTS:
                    expected = f"expected experts as numbers from 0 to below {MAX_EXPERTS}"
                    raise TraceError(f"{where}, MoE layer {layer}: {expected}, found {expert!r}")
            if len(set(ids)) < len(ids):
                raise TraceError(f"{where}, MoE layer {layer}: an expert stands there twice")
            flat.extend(ids)
            counts.append(len(ids))
        if [type(part) for part in mark] != [int, int, bool] or not all(0 <= part < 2**31 for part in mark):
            raise TraceError(f"{where}: expected numbers for seq and step and true or false for prefill, found {mark}")
        width = len(layers)
        marks.append(mark)
    if not flat:
        raise TraceError(f"{file}: is empty: expected a line a token, with the experts that it chose")
    chosen = np.array(counts).reshape(-1, width)
    experts = np.full((*chosen.shape, chosen.max()), -1, np.int16)
    experts[np.arange(experts.shape[2]) < chosen[..., None]] = flat
    sequences, steps, prefill = (np.array(part) for part in zip(*marks, strict=True))
    return _trace(file, experts, sequences, steps, prefill)


def _read_npz(archive: zipfile.ZipFile, file: Path) -> Trace:
    """``experts``: integers [tokens, layers, k]. ``offsets``, where there are some: the first token of each sequence,
    and the end. ``num_experts``, likewise: of a layer. Other arrays are not looked at."""
    ids = read_member(archive, "experts.npy", str(file))
    if ids.dtype.kind not in "iu" or ids.ndim != 3 or not ids.size:
        raise TraceError(f"{file}: experts: expected integers [tokens, layers, k], found {ids.dtype} {ids.shape}")
    tokens, bound, cuts = len(ids), MAX_EXPERTS, np.array([0, len(ids)])
    if "num_experts.npy" in archive.namelist():
        bound = int(read_member(archive, "num_experts.npy", str(file)).reshape(-1)[0])
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
        raise TraceError(f"{file}: offsets: expected them to rise, found {cuts[at + 1]} at {at + 1} behind {cuts[at]}")
    sequences = np.searchsorted(cuts[1:], np.arange(tokens), side="right")
    trace = _trace(file, ids.astype(np.int16), sequences, np.arange(tokens), np.zeros(tokens, bool))
    return trace if bound == MAX_EXPERTS else replace(trace, info=replace(trace.info, experts=bound))


def _trace(file: Path, experts: Ids, sequences: Array, steps: Array, prefill: Array) -> Trace:
    """Of a file that does not say of which model it is."""
    info = TraceInfo(file.stem, experts.shape[1], tuple(range(experts.shape[1])), int(experts.max()) + 1)
    try:
        return Trace(info, experts, sequences.astype(np.int32), steps.astype(np.int32), prefill.astype(bool))
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from error


def convert(trace: Trace, file: Path, form: str) -> None:
    """Write ``trace`` as one of FORMS. Raises UsageError where a form cannot hold it, and OSError."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}; known are {', '.join(FORMS)}")
    {"tierlm": write_trace, "jsonl": _write_jsonl, "npz": _write_npz, "oracle": _write_oracle}[form](file, trace)


def _write_jsonl(file: Path, trace: Trace) -> None:
    """Ids ascending within a layer; sequence, step and phase beside them."""
    with whole(file) as stream:
        for token in range(len(trace)):
            layers = [sorted(expert for expert in ids if expert >= 0) for ids in trace.experts[token].tolist()]
            marks = {"seq": int(trace.sequences[token]), "step": int(trace.steps[token])}
            line = {"tok": token, **marks, "prefill": bool(trace.prefill[token]), "layers": layers}
            stream.write(json.dumps(line).encode() + b"\n")


def _write_npz(file: Path, trace: Trace) -> None:
    """Tokens by sequence, steps and phases are left out."""
    if (trace.experts < 0).any():
        raise UsageError(
            "npz: tokens of this trace chose different numbers of experts, which [tokens, layers, k] lacks"
        )
    order = np.argsort(trace.sequences, kind="stable")
    lengths = np.unique(trace.sequences, return_counts=True)[1]
    offsets, count = np.concatenate([[0], np.cumsum(lengths)]), np.array(trace.info.experts)
    with whole(file) as stream:
        np.savez_compressed(stream, experts=trace.experts[order], offsets=offsets, num_experts=count)


def _write_oracle(file: Path, trace: Trace) -> None:
    """libCacheSim's oracleGeneral: a request a record and step, 24 bytes little-endian: uint32 time (the step), uint64
    object (MoE layer x experts + expert), uint32 bytes, int64 the number of the next request for it, -1: none.
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
    """For each request the number of the next one for the same object, int64 [n], -1 where there is none."""
    order = np.argsort(requests, kind="stable")
    following = np.full(len(requests), -1, np.int64)
    same = requests[order[1:]] == requests[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following
