"""What is no regular file, is too large, or changes under a run, wherever tierlm reads a file: an error at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tierlm import LLM, Budget, CheckpointError, SamplingParams, StorageError, TierlmError, UsageError
from tierlm.checkpoints import checkpoint
from tierlm.checkpoints.checkpoint import MAX_HEADER, Checkpoint, read_header, read_json
from tierlm.checkpoints.disk_profile import ProfileCache
from tierlm.checkpoints.mirrors import find_copies
from tierlm.memory.heat import Heat
from tierlm.models.catalog import Catalog
from tierlm.models.packing import pack_model
from tierlm.policies import make_policy
from tierlm.policies.eviction import TierInfo
from tierlm.profiling.profile import read_profile
from tierlm.text import TextCodec
from tierlm.tracing.traceforms import read_trace

RAM = Budget("8GiB")
FEW = SamplingParams(max_new_tokens=3, ignore_eos=True)


@pytest.fixture
def model(toy_v3: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the toy."""
    return Path(shutil.copytree(toy_v3[0], tmp_path / "model"))


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """A file that is waited for ends the test, not the patience."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(file: Path) -> Path:
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    os.mkfifo(file)
    return file


def own_template(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    TextCodec(folder).chat([])


def packed(folder: Path) -> None:
    fifo(folder.parent / "out.unfinished" / "tierlm.json")
    pack_model(folder, folder.parent / "out", experts="keep", trunk="keep")


# Each file, and what reads it.
READ: dict[str, Callable[[Path], object]] = {
    "config.json": Catalog,
    "generation_config.json": Catalog,
    "model.safetensors": Catalog,
    "model.safetensors.index.json": Catalog,
    "tokenizer.json": TextCodec,
    "chat_template.jinja": own_template,
    "trace": lambda folder: read_trace(folder / "trace"),
    "profile": lambda folder: read_profile(folder / "profile"),
    "policy.json": lambda folder: make_policy(str(folder / "policy.json"), TierInfo(4, 4)),
    "out.unfinished/tierlm.json": packed,
}


@pytest.mark.parametrize("name", READ)
def test_fifo_in_the_place_of_a_file(model: Path, name: str) -> None:
    if "/" not in name:
        fifo(model / name)
    with pytest.raises(TierlmError, match=f"{name}.*expected a regular file, found a FIFO"):
        READ[name](model)


def test_fifo_in_the_place_of_a_copy(model: Path, tmp_path: Path) -> None:
    fifo(tmp_path / "mirror" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mirror/model\.safetensors: expected \d+ bytes as in .*, found 0"):
        find_copies([model / "model.safetensors"], [tmp_path / "mirror"])


def test_fifo_in_the_cache_is_no_heat_and_no_profile(tmp_path: Path, toy_v3: tuple[Path, Any]) -> None:
    assert not Heat.read(fifo(tmp_path / "heat.json"), []).uses
    fifo(tmp_path / "disk.json")
    assert ProfileCache(tmp_path).get(toy_v3[0]) is None


# --- too large

HOSTILE = {
    "empty lists": b'{"w": [' + b"[]," * 10_000 + b"[]]}",
    "numbers": b'{"w": {"dtype": "U8", "shape": [' + b"1," * 10_000 + b'1], "data_offsets": [0, 1]}}',
    "nested": b"[" * 20_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_values_are_counted_before_they_are_made(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a lower limit, since the test is to be fast."""
    monkeypatch.setattr(checkpoint, "MAX_VALUES", 10_000)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "config.json").write_bytes(text)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*at most 10000 values, found about [12]00"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json.*at most 10000 values"):
        read_json(tmp_path / "config.json")
    assert tracemalloc.get_traced_memory()[1] < 5 * len(text) + 200_000
    tracemalloc.stop()


def test_header_of_95_megabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as stream:
        stream.write((95_000_000).to_bytes(8, "little"))
        stream.truncate(2**28)
    with pytest.raises(CheckpointError, match=f"header of at most {MAX_HEADER} bytes, found 95000000"):
        read_header(file)


def test_config_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with open(file, "wb") as stream:
        stream.truncate(2**28)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: expected at most"):
        read_json(file)


def test_published_headers_are_far_below_the_limits(tmp_path: Path) -> None:
    """An index like DeepSeek-V3's: 92,000 tensors with long names."""
    names = [
        f"model.layers.{i // 1536}.mlp.experts.{i // 6 % 256}.down_proj.weight_scale_inv.{i}" for i in range(92_000)
    ]
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-000163")}))
    assert len(read_json(tmp_path / "index.json")["weight_map"]) == 92_000


# --- changed under a run


def test_model_replaced_between_its_header_and_its_first_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size and header, as another version of the model has it."""
    real = Catalog.__init__

    def replaced(self: Catalog, folder: Path, mtp: bool) -> None:
        real(self, folder, mtp)
        shutil.copy(folder / "model.safetensors", folder / "new")
        os.replace(folder / "new", folder / "model.safetensors")

    monkeypatch.setattr(Catalog, "__init__", replaced)
    with pytest.raises(StorageError, match=r"model\.safetensors: reading .* changed or replaced since its header"):
        LLM.load(model, budget=RAM)
    monkeypatch.undo()
    with LLM.load(model, budget=RAM) as llm:
        assert len(llm.generate([[5, 6, 7]], FEW)[0].ids) == 3


def test_model_written_while_it_is_packed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, with the same size: no read fails, and what was packed is of both."""
    out = model.parent / "out"

    def touch(done: int, total: int) -> None:
        os.utime(model / "model.safetensors", ns=(0, done))

    with pytest.raises(StorageError, match=r"model\.safetensors: the file was changed.*modified.* of no use"):
        pack_model(model, out, experts="keep", trunk="keep", progress=touch)
    assert not out.exists()
    with pytest.raises(UsageError, match="files changed since"):
        pack_model(model, out, experts="keep", trunk="keep")
