"""User input: sizes, budgets, sampling, options. Every meaningless value is refused by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierlm.config import Budget, LoadOptions, RuntimeOptions, SamplingParams, format_size, parse_size
from tierlm.errors import TierlmError, UsageError

PROFILE = settings(deadline=None, derandomize=True, max_examples=100)
NAN, INF = float("nan"), float("inf")
GIANT = 10**400  # an integer beyond any float


@pytest.mark.parametrize(
    ("given_size", "size"),
    [
        (0, 0),
        (5, 5),
        (1.9, 1),
        (10**18, 10**18),
        ("0", 0),
        ("123", 123),
        ("123b", 123),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        ("  8   GiB  ", 8 * 2**30),
        ("8g", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("500 MB", 500 * 10**6),
        ("500m", 500 * 2**20),
        ("3kB", 3000),
        ("3k", 3072),
        ("1.5g", 3 * 2**29),
        (".5KiB", 512),
        ("0.5", 0),
        ("2TB", 2 * 10**12),
        ("2t", 2**41),
        ("2TiB", 2**41),
    ],
)
def test_sizes(given_size: Any, size: int) -> None:
    found = parse_size(given_size)
    assert found == size and type(found) is int


BAD_SIZES: list[Any] = [
    *(NAN, INF, -INF, -1, -0.5, True, False, None, [], b"8GiB", 1j, GIANT),
    *("", " ", "nan", "NaN", "inf", "-inf", "-1", "-1GiB", "+1", "8 GiBs", "8 Gi", "GiB", "8 G iB", "8,5GiB", "1e9"),
    *("1e9B", "1_000", "0x10", "1.", "1.2.3", "8GiB 1", "auto", "\u0663", "\uff18GiB", "9" * 400, "8\nGiB\nx", "K8"),
]


@pytest.mark.parametrize("size", BAD_SIZES, ids=lambda size: repr(size)[:20])
def test_bad_sizes_are_usage_errors(size: Any) -> None:
    with pytest.raises(UsageError, match=r"^budget ram: expected"):
        parse_size(size, "budget ram")


def test_usage_errors_are_value_errors_with_exit_code_two() -> None:
    with pytest.raises(ValueError, match=r"^size: ") as caught:
        parse_size("much")
    assert isinstance(caught.value, TierlmError) and caught.value.exit_code == 2
    assert "'much'" in str(caught.value)


@PROFILE
@given(
    st.one_of(
        st.text(max_size=8),
        st.floats(),
        st.integers(max_value=10**300),
        st.from_regex(r"\A[0-9.]{1,5} ?[kmgtKMGTiBb]{0,3}\Z"),
    )
)
def test_any_size_is_bytes_or_a_usage_error(size: Any) -> None:
    try:
        found = parse_size(size)
    except UsageError:
        return
    assert type(found) is int and found >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20, "1.00 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**40, "1.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert format_size(size) == text


@PROFILE
@given(st.integers(0, 2**52))
def test_sizes_for_people_can_be_read_back(size: int) -> None:
    assert math.isclose(parse_size(format_size(size)), size, rel_tol=0.01, abs_tol=1)


# --- budget


def test_budget() -> None:
    budget = Budget("1.5GiB", 1000)
    assert (budget.ram, budget.vram) == (3 * 2**29, 1000)
    assert (Budget().ram, Budget().vram) == (None, None)
    assert Budget(0, 0) == Budget("0", "0 B")
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.ram = 5  # type: ignore[misc]


@pytest.mark.parametrize("size", [NAN, INF, -1, "8 GiBs", "", True, "nan", [], GIANT], ids=lambda size: repr(size)[:20])
@pytest.mark.parametrize("tier", ["ram", "vram"])
def test_bad_budgets_name_the_tier(tier: str, size: Any) -> None:
    with pytest.raises(UsageError, match=rf"^budget {tier}: expected"):
        Budget(**{tier: size})


def test_ram_none_and_vram_auto_mean_nothing() -> None:
    with pytest.raises(UsageError, match=r"^budget ram"):
        Budget(ram=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^budget vram"):
        Budget(vram="auto")


# --- sampling

BAD_SAMPLING: list[tuple[str, Any]] = [
    *(("max_new_tokens", value) for value in (0, -1, 1.0, NAN, "5", None, True)),
    *(("temperature", value) for value in (-0.1, NAN, INF, "1", None, True, 1j, GIANT)),
    *(("top_k", value) for value in (-1, 1.5, NAN, "5", None, True)),
    *(("top_p", value) for value in (0, 0.0, -0.5, 1.01, NAN, INF, "1", None, True)),
    *(("min_p", value) for value in (-0.1, 1, 1.0, 2, NAN, "0", None, False)),
    *(("repetition_penalty", value) for value in (0, -1.0, NAN, INF, "1", None, True)),
    *(("seed", value) for value in (1.0, "1", True, NAN, 2**64, -(2**63) - 1)),
    *(("stop", value) for value in ("", [""], ["a", ""], [1], [None], [b"a"], None, 5)),
    *(("stop_ids", value) for value in ([-1], [1.0], ["1"], [None], [True], "12", None, 5)),
    *(("ignore_eos", value) for value in (None, 1, "yes")),
    *(("frequency_penalty", value) for value in (2.1, -2.1, NAN, INF, "1", None, True)),
    *(("presence_penalty", value) for value in (2.1, -2.1, NAN, INF, "1", None, True)),
    *(("logit_bias", value) for value in ({-1: 0}, {1.0: 0}, {"1": 0}, {True: 0}, {1: 101}, {1: NAN}, {1: "1"})),
    *(("logit_bias", value) for value in (None, "", 5, [1], [(1, 2.0)])),
    *(("n", value) for value in (0, -1, 1.0, "2", None, True)),
    *(("logprobs", value) for value in (-1, 101, 1.0, "2", True)),
]


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING, ids=lambda value: repr(value)[:20])
def test_bad_sampling_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: expected"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 1},
        {"temperature": 0},
        {"temperature": 3.5},
        {"top_k": 1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 0.999},
        {"repetition_penalty": 0.5},
        {"seed": 0},
        {"seed": -1},
        {"seed": 2**64 - 1},
        {"ignore_eos": True},
        {"frequency_penalty": -2, "presence_penalty": 2.0},
        {"logit_bias": {5: -100, 6: 100.0}},
        {"n": 3, "seed": 2**64 - 3},
        {"logprobs": 0},
        {"logprobs": 100},
    ],
    ids=str,
)
def test_good_sampling_is_kept(changes: dict[str, Any]) -> None:
    params = SamplingParams(**changes)
    for name, value in changes.items():
        assert getattr(params, name) == value


def test_stops_become_tuples() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"], stop_ids=[3, 4]) == SamplingParams(stop=("a", "b"), stop_ids=(3, 4))
    assert SamplingParams().stop == () == SamplingParams().stop_ids
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop="a"))


def test_a_bias_is_the_parameters_own() -> None:
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 2.0
    assert params == SamplingParams(logit_bias={5: 1.0}) != SamplingParams()
    assert hash(params) == hash(SamplingParams(logit_bias={5: 1.0}))


def test_the_last_samples_seed_is_one_too() -> None:
    with pytest.raises(UsageError, match=r"^n: expected at most 3 with the seed 18446744073709551613, found 4"):
        SamplingParams(n=4, seed=2**64 - 3)


# --- options

BAD_OPTIONS: list[tuple[str, Any]] = [
    *(("reader", value) for value in ("", "Direct", "o_direct", None, 1)),
    *(("mirrors", value) for value in ("folder", Path("folder"), [""], ["a", 1], [None], None, 5)),
    *(("probe", value) for value in ("", "on", "Auto", None, True)),
    *(("kv_dtype", value) for value in ("", "float16", "fp32", None)),
    *(("prefill_chunk", value) for value in (0, -1, 1.0, "512", None, True)),
    *((field, value) for field in ("threads", "transfer_threads") for value in (0, -1, 257, 8.0, "8", True)),
    *(("io_timeout", value) for value in (0, -1, NAN, INF, "60", None, True)),
    *(("context", value) for value in (0, -1, 1.5, "4096", True, NAN)),
    *(("logits_tokens", value) for value in (0, -1, 1.5, "4", True)),
    *(("ram_slots", value) for value in (0, -1, 1.5, "4", True)),
    *(("vram_slots", value) for value in (0, -1, 1.5, "4", True)),
    *(("resident_trunks", value) for value in (-1, 1.5, "4", True)),
    *((field, value) for field in ("device", "policy", "predictor") for value in (None, 1, True)),
    *((field, value) for field in ("exact", "heat", "trace_scores") for value in (None, 1, "yes")),
    *((field, value) for field in ("timeline", "trace") for value in ("", 1, b"file", True)),
    ("trace_scores", True),
]


@pytest.mark.parametrize(("field", "value"), BAD_OPTIONS, ids=lambda value: repr(value)[:20])
def test_bad_options_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: expected") as caught:
        RuntimeOptions(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"reader": value} for value in ("auto", "direct", "mmap")),
        *({"kv_dtype": value} for value in ("auto", "float32", "bfloat16")),
        *({"context": value} for value in (None, 1, 10**7)),
        *({"transfer_threads": value} for value in (None, 1, 256)),
        *({"probe": value} for value in ("auto", "refresh", "off")),
        {"resident_trunks": 0, "ram_slots": 1, "vram_slots": 1, "prefill_chunk": 1, "io_timeout": 0.001},
    ],
    ids=str,
)
def test_good_options_are_kept(changes: dict[str, Any]) -> None:
    options = RuntimeOptions(**changes)
    for name, value in changes.items():
        assert getattr(options, name) == value


def test_mirrors_become_a_tuple() -> None:
    assert RuntimeOptions().mirrors == ()
    assert RuntimeOptions(mirrors=["a", Path("b")]).mirrors == ("a", Path("b"))
    assert hash(RuntimeOptions(mirrors=["a"])) == hash(RuntimeOptions(mirrors=("a",)))


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RuntimeOptions().reader = "mmap"  # type: ignore[misc]


def test_keywords_of_load_are_the_options() -> None:
    assert get_type_hints(LoadOptions) == get_type_hints(RuntimeOptions)
    assert not LoadOptions.__required_keys__
