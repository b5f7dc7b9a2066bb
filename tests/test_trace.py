"""Traces: what is written can be read, other tools' formats too, and errors name their place."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierlm.errors import TraceError, UsageError
from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.tracefile import HEAD, TraceWriter, write_trace
from tierlm.tracing.traceforms import FORMS, ORACLE, convert, read_trace

TOKENS, LAYERS, CHOSEN, EXPERTS = 60, 3, 4, 16
LINES = [json.dumps({"tok": i, "layers": [[0, 1 + i], [2, 3]]}) for i in range(5)]


def make_trace(**changes: Any) -> Trace:
    """Two sequences: a prefill of ten tokens in one step, decode steps of one token, and of two."""
    chance = np.random.default_rng(3)
    experts = np.argsort(chance.random((TOKENS, LAYERS, EXPERTS)), axis=2)[:, :, :CHOSEN].astype(np.int16)
    steps = np.concatenate([np.zeros(10), np.arange(1, 31), np.repeat(np.arange(31, 41), 2)]).astype(np.int32)
    sequences = np.concatenate([np.zeros(40), np.arange(20) % 2]).astype(np.int32)
    order = tuple(tuple(range(EXPERTS))[::-1] for _ in range(LAYERS))
    info = TraceInfo("toy", LAYERS + 1, tuple(range(1, LAYERS + 1)), EXPERTS, 1000, order)
    parts: dict[str, Any] = {"experts": experts, "sequences": sequences, "steps": steps, "prefill": steps == 0}
    return Trace(info, **(parts | changes))


def same(one: Trace, other: Trace, *names: str) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_own_format_gives_back_everything(tmp_path: Path) -> None:
    chance = np.random.default_rng(4)
    scores = chance.random((TOKENS, LAYERS, EXPERTS)).astype(np.float16)
    predictions = chance.integers(-1, EXPERTS, (TOKENS, LAYERS, 3, 8)).astype(np.int16)
    trace = make_trace(scores=scores, predictions=predictions)
    write_trace(tmp_path / "t", trace)
    found = read_trace(tmp_path / "t", scores=True)
    assert found.info == trace.info
    assert same(found, trace, "experts", "sequences", "steps", "prefill", "scores", "predictions")
    assert read_trace(tmp_path / "t").scores is None
    assert np.array_equal(np.load(tmp_path / "t")["0/experts"], trace.experts)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_blocks_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierlm.tracing.tracefile.BLOCK", 7)
    monkeypatch.setattr("tierlm.tracing.tracefile.BLOCK_BYTES", 7 * LAYERS * CHOSEN)
    monkeypatch.setattr("tierlm.tracing.trace.BLOCK", 7)
    trace = make_trace()
    write_trace(tmp_path / "t", trace)
    found = read_trace(tmp_path / "t")
    assert len(zipfile.ZipFile(tmp_path / "t").namelist()) == 1 + 4 * 9
    assert same(found, trace, "experts", "sequences", "steps", "prefill")
    assert list(found.passes()) == list(trace.passes())


def test_a_trace_without_a_token_is_not_written_and_an_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("old")
    TraceWriter(tmp_path / "t", make_trace().info).close()
    assert (tmp_path / "t").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_steps_need_each_expert_once() -> None:
    trace = make_trace()
    steps = list(trace.passes())
    assert [step.tokens for step in steps] == [10] + [1] * 30 + [2] * 10
    assert [step.prefill for step in steps] == [True] + [False] * 40
    for step, (start, stop) in zip(steps, trace.bounds(), strict=True):
        for layer, needed in enumerate(step.needed):
            assert needed == sorted(set(trace.experts[start:stop, layer].flatten().tolist()))


@pytest.mark.parametrize("form", ["jsonl", "npz"])
def test_other_forms_there_and_back(form: str, tmp_path: Path) -> None:
    trace = make_trace()
    convert(trace, tmp_path / "t", form)
    found = read_trace(tmp_path / "t")
    assert found.info.experts == EXPERTS and len(found) == TOKENS
    if form == "jsonl":
        assert list(found.passes()) == list(trace.passes())
        assert same(found, trace, "sequences", "steps", "prefill")
    else:
        order = np.argsort(trace.sequences, kind="stable")
        assert np.array_equal(found.experts, trace.experts[order])
        assert np.array_equal(found.sequences, trace.sequences[order])


def test_oracle_general_knows_each_next_use(tmp_path: Path) -> None:
    trace = make_trace()
    convert(trace, tmp_path / "t", "oracle")
    rows = np.fromfile(tmp_path / "t", ORACLE)
    assert ORACLE.itemsize == 24
    objects = [layer * EXPERTS + e for step in trace.passes() for layer, ids in enumerate(step.needed) for e in ids]
    assert rows["object"].tolist() == objects and set(rows["bytes"].tolist()) == {1000}
    for at, name in enumerate(objects):
        later = [i for i in range(at + 1, len(objects)) if objects[i] == name]
        assert rows["next"][at] == (later[0] if later else -1)


def test_unknown_form_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="parquet"):
        convert(make_trace(), tmp_path / "t", "parquet")
    assert set(FORMS) == {"tierlm", "jsonl", "npz", "oracle"}


# Harmless input is read


def test_jsonl_with_other_keys_empty_lists_and_differing_numbers(tmp_path: Path) -> None:
    lines = ['{"layers": [[], [5, 2, 9], [1]], "text": "a"}', "", '{"tok": 7, "layers": [[], [4], [0, 3]]}']
    (tmp_path / "t").write_text("\n".join(lines))
    found = read_trace(tmp_path / "t")
    assert [step.needed for step in found.passes()] == [[[], [2, 5, 9], [1]], [[], [4], [0, 3]]]
    assert found.experts[0, 1].tolist() == [5, 2, 9] and found.info.experts == 10


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "u2"])
def test_npz_of_any_integers_with_or_without_offsets(dtype: str, tmp_path: Path) -> None:
    experts = make_trace().experts
    np.savez(tmp_path / "a.npz", experts=experts.astype(dtype), names=np.array(["x"]))
    np.savez(tmp_path / "b.npz", experts=experts.astype(dtype), offsets=np.array([0, 20, 20, TOKENS]))
    one, two = read_trace(tmp_path / "a.npz"), read_trace(tmp_path / "b.npz")
    assert same(one, two, "experts") and np.array_equal(one.experts, experts)
    assert set(one.sequences.tolist()) == {0} and two.sequences.tolist() == [0] * 20 + [2] * 40


# Wrong input is refused


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("\n".join(LINES)[:-9], "line 5"),
        ("\n".join([*LINES[:2], '{"layers": [[1, 2]]}']), "line 3.*expected 2 layers"),
        ("\n".join([LINES[0], '{"layers": [[1, -1], [2]]}']), "line 2, MoE layer 0.*-1"),
        ("\n".join([LINES[0], '{"layers": [[1], [99999]]}']), "line 2, MoE layer 1.*99999"),
        ("\n".join([LINES[0], '{"layers": [[1], [2.5]]}']), "line 2.*2.5"),
        ("\n".join([LINES[0], '{"layers": [[1], [true]]}']), "line 2.*True"),
        ("\n".join([LINES[0], '{"layers": [[1, 1], [2]]}']), "line 2, MoE layer 0.*twice"),
        ("\n".join([LINES[0], '{"layers": [1, 2]}']), "line 2"),
        ("\n".join([LINES[0], '{"tok": 3}']), "line 2"),
        ("\n".join([LINES[0], "[1]"]), "line 2"),
        ('{"layers": [[], []]}', "empty"),
        ('{"layers": [[1]], "step": 5}\n{"layers": [[1]], "step": 4}', "steps in order"),
        ('{"layers": [[1]], "step": "x"}', "line 1"),
        ("\x00\x01\x02", "line 1"),
        ('{"layers": ' + "[" * 5000, "line 1"),
    ],
)
def test_bad_lines_are_refused_with_their_number(text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(TraceError, match=place) as caught:
        read_trace(tmp_path / "t")
    assert str(tmp_path / "t") in str(caught.value) and caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ({}, "experts"),
        ({"experts": np.zeros((0, 3, 2), int)}, "experts"),
        ({"experts": np.zeros((4, 3), int)}, "experts"),
        ({"experts": np.zeros((4, 3, 2))}, "experts"),
        ({"experts": np.array([[[1, 2]], [[3, -1]]])}, "token 1, layer 0.*-1"),
        ({"experts": np.array([[[1, 2]], [[3, 70000]]])}, "token 1, layer 0.*70000"),
        ({"experts": np.array([[[1, 2]], [[3, 9]]]), "num_experts": np.array(9)}, "token 1, layer 0.*9"),
        ({"experts": np.array([[[1, 2]], [[3, 3]]])}, "token 1, MoE layer 0.*twice"),
        ({"experts": np.array([[[1, 2]], [[3, 4]]]), "offsets": np.array([0, 3])}, "offsets.*0 to 2"),
        ({"experts": np.array([[[1, 2]], [[3, 4]]]), "offsets": np.array([0, 2, 1, 2])}, "offsets.*1 at 2"),
        ({"experts": np.array([[[1, 2]], [[3, 4]]]), "offsets": np.array([0.0, 2.0])}, "offsets"),
        ({"experts": np.array([[[1, "x"]]], object)}, "experts"),
    ],
)
def test_bad_arrays_are_refused_with_their_place(parts: dict[str, Any], place: str, tmp_path: Path) -> None:
    with open(tmp_path / "t", "wb") as stream:
        np.savez(stream, **parts)
    with pytest.raises(TraceError, match=place):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize("form", ["tierlm", "npz"])
def test_a_file_that_was_cut_or_damaged_is_refused(form: str, tmp_path: Path) -> None:
    convert(make_trace(), tmp_path / "t", form)
    whole = (tmp_path / "t").read_bytes()
    for size in (3, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "t").write_bytes(whole[:size])
        with pytest.raises(TraceError):
            read_trace(tmp_path / "t")
    damaged = bytearray(whole)
    damaged[80:120] = bytes(40)
    (tmp_path / "t").write_bytes(damaged)
    with pytest.raises(TraceError, match="offset"):
        read_trace(tmp_path / "t")


def test_a_header_that_lies_takes_no_memory(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (1000000000, 1000, 6), }"
    with zipfile.ZipFile(tmp_path / "t", "w") as archive:
        archive.writestr("experts.npy", header + text.ljust(117) + b"\n" + bytes(100))
    with pytest.raises(TraceError, match="offset 0"):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 2, found .* version 1"),
        ({"format": "other"}, "found 'other'"),
        ({"tokens": 61}, "expected 61 tokens"),
        ({"blocks": 2}, "1/experts"),
        ({"experts": 15, "order": []}, "expected experts 0 to 14"),
        ({"experts": 10**9}, "4096"),
        ({"layers": 3}, "within 3 layers"),
        ({"moe_layers": [1, 3, 2]}, r"3 MoE layers within 4 layers, found \(1, 3, 2\)"),
        ({"moe_layers": [1, 2]}, "expected 3 MoE layers"),
        ({"moe_layers": [-1, 2, 3]}, "MoE layers"),
        ({"moe_layers": ["x"]}, HEAD),
        ({"order": [[0, 1]] * 3}, "order"),
        ({"order": 5}, HEAD),
        ({"model": None, "layers": "x"}, HEAD),
    ],
)
def test_a_head_that_lies_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_trace(tmp_path / "t", make_trace())
    with zipfile.ZipFile(tmp_path / "t") as source, zipfile.ZipFile(tmp_path / "u", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, json.dumps(json.loads(content) | change) if name == HEAD else content)
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "u")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none")


@pytest.mark.parametrize("head", [True, False])
def test_a_file_that_unpacks_to_much_more_is_refused(head: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("experts.npy", "w") as member:
            np.lib.format.write_array(member, np.zeros((2**19, 8, 8), np.int16))
        if head:
            archive.writestr(HEAD, "{}")
    assert (tmp_path / "t").stat().st_size < 2**18
    with pytest.raises(TraceError, match=r"expected at most \d+ bytes of arrays in a file of \d+, found 67108\d+"):
        read_trace(tmp_path / "t")


def test_a_zip_that_hides_its_size_is_not_unpacked_beyond_it(tmp_path: Path) -> None:
    """A member with more than it says, by its compressed bytes: only what it says is read."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.zeros((64, 8, 8), np.int16))
    with zipfile.ZipFile(tmp_path / "t", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("experts.npy", out.getvalue() + bytes(2**26))
    said, held = len(out.getvalue()).to_bytes(4, "little"), (len(out.getvalue()) + 2**26).to_bytes(4, "little")
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes().replace(held, said))
    tracemalloc.start()
    with pytest.raises(TraceError, match="Bad CRC-32"):
        read_trace(tmp_path / "t")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_lines_of_few_experts_and_one_of_many_do_not_fill_the_memory(tmp_path: Path) -> None:
    few, many = '{"layers": [[0]]}\n', json.dumps({"layers": [list(range(4096))]})
    (tmp_path / "t").write_text(few * 10_000 + many)
    with pytest.raises(TraceError, match="bytes of arrays in a file"):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    "change", [{"layers": 10**7, "moe_layers": [1, 2, 10**6]}, {"record_bytes": -1}, {"experts": 1}]
)
def test_numbers_that_no_model_has(change: dict[str, Any]) -> None:
    trace = make_trace()
    with pytest.raises(TraceError, match="expected"):
        replace(trace, info=replace(trace.info, **change))


def test_parts_of_other_dimensions_are_refused() -> None:
    trace = make_trace()
    with pytest.raises(TraceError, match="steps: expected one entry for each of"):
        replace(trace, steps=trace.steps[:, None])
