"""Files are data: whatever they hold, the answer is a result or an error of ours, within seconds and bounded memory.

Each test takes a valid file and damages it (made_damage.py). TIERLM_FUZZ_CASES: cases of each test; with it, the cases
are new in each run (``make fuzz``).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.made_damage import (
    BYTES,
    CUTS,
    DAMAGE,
    Damage,
    Hang,
    cut,
    damaged,
    damaged_header,
    damaged_lines,
    damaged_zip,
    limits,
)
from tests.made_damaged_gguf import WholeGguf, damaged_metadata
from tests.made_gguf import byte_level_metadata, sentencepiece_metadata, write_gguf
from tests.test_text import make_codec
from tests.toys import TOYS, make_toy, settings_of
from tierlm import LLM, Budget, SamplingParams, TierlmError
from tierlm.checkpoints.disk_profile import DiskProfile, ProfileCache
from tierlm.checkpoints.verify import damage as damage_of
from tierlm.cli.output import STDOUT
from tierlm.cli.planning import plan
from tierlm.memory.heat import Heat
from tierlm.models.catalog import Catalog
from tierlm.models.packing import pack_model
from tierlm.planning.recorded import RecordedHits
from tierlm.profiling.profile import DiskRate, KernelRate, MemoryRate, Profile, Spread
from tierlm.text import TextCodec
from tierlm.tracing.trace import Trace, TraceInfo
from tierlm.tracing.traceforms import convert, read_trace

GIVEN = os.environ.get("TIERLM_FUZZ_CASES")
PROFILE = settings(
    max_examples=int(GIVEN or 72),
    derandomize=GIVEN is None,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}


def tried(run: Callable[..., object], *arguments: Any) -> None:
    """Call ``run`` within the limits of a case; an error of ours is an answer."""
    with limits(), suppress(TierlmError), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(*arguments)


def test_limits_are_felt() -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(MemoryError), limits():
        bytearray(2 * BYTES)
    bytearray(2 * BYTES)
    with pytest.raises(Hang), limits(0.01):
        spin()


def replaced(file: Path, content: bytes) -> Path:
    """Another file of the same name, since hard links share content."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A small model in two shards, with a tokenizer. A test damages a copy."""
    made = folder / "model"
    reference = make_toy("v3", made, topk_group=1, **SMALL)
    (made / "model.safetensors").unlink()
    reference.save_pretrained(made, max_shard_size="60KB")
    make_codec(made, bos_token="<|begin|>", add_bos_token=True, chat_template=TEMPLATE)
    return made


@pytest.fixture(scope="module")
def packs(folder: Path, model: Path) -> dict[str, Path]:
    for name, options in {
        "kept": {"experts": "keep", "trunk": "keep"},
        "int4": {"experts": "int4", "trunk": "int8"},
        "zstd": {"experts": "bf16", "trunk": "bf16", "codec": "zstd"},
    }.items():
        pack_model(model, folder / name, **options)
    return {name: folder / name for name in ("kept", "int4", "zstd")}


@pytest.fixture
def copy_of(folder: Path) -> Iterator[Callable[[Path], Path]]:
    """Copies a folder by hard links."""
    to = folder / "copy"

    def copied(original: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        return Path(shutil.copytree(original, to, copy_function=os.link))

    yield copied
    shutil.rmtree(to, ignore_errors=True)


def use(folder: Path) -> None:
    """Check, load and run a model, by ids and by text."""
    catalog = Catalog(folder)
    list(damage_of(catalog.checkpoint, lambda done, total: None))
    with LLM.load(folder, budget=Budget("8GiB"), probe=False) as llm:
        llm.generate([3, 5, 7], SamplingParams(max_new_tokens=2))
        llm.generate("the quick brown fox", SamplingParams(max_new_tokens=2))


GGUFS = {"v2": Type.F16, "v3": Type.F32, "qwen3": Type.Q8_0, "olmoe": Type.Q4_1, "glm4": Type.BF16, "minimax": Type.F32}
GGUFS |= {"mixtral": Type.Q4_0, "gpt-oss": Type.F32}
CONFIGS = [*TOYS, "DeepSeek-V3", "gpt-oss-20b", "Qwen3-30B-A3B"]


@pytest.mark.parametrize("format", [None, "int4"])
@PROFILE
@given(name=st.sampled_from(CONFIGS), damage=DAMAGE)
def test_plans_of_configs(format: str | None, name: str, damage: Damage, folder: Path) -> None:
    from tierlm.planning.known import known_models

    config = settings_of(name) if name in TOYS else known_models()[name]["config"]
    file = replaced(folder / "config.json", damaged(json.dumps(config).encode(), damage))
    vram = "1GiB" if format else None
    tried(partial(plan, vram=vram, format=format, prompt=16, json=STDOUT), str(file), "8GiB")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
)
@PROFILE
@given(damage=DAMAGE)
def test_models_with_a_damaged(name: str, damage: Damage, model: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(model)
    replaced(folder / name, damaged((model / name).read_bytes(), damage))
    tried(use, folder)


@PROFILE
@given(damage=DAMAGE, shard=st.integers(0, 1))
def test_models_with_a_damaged_shard(damage: Damage, shard: int, model: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(model)
    file = sorted(folder.glob("*.safetensors"))[shard]
    replaced(file, damaged_header(file.read_bytes(), damage))
    tried(use, folder)


@pytest.mark.parametrize("kind", ["kept", "int4", "zstd"])
@PROFILE
@given(damage=DAMAGE, shard=st.integers(0, 5))
def test_packs(kind: str, damage: Damage, shard: int, packs: dict[str, Path], copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(packs[kind])
    files = sorted(folder.glob("*.safetensors"))
    file = files[shard % len(files)]
    replaced(file, damaged_header(file.read_bytes(), damage))
    tried(use, folder)


def speak(model: Path) -> None:
    codec = TextCodec(model)
    bool(codec.template)
    ids = codec.encode("the quick brown fox: naïve 日本 🙂")
    codec.decode([*ids, *range(400)])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@PROFILE
@given(damage=DAMAGE)
def test_tokenizers(name: str, damage: Damage, model: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(model)
    replaced(folder / name, damaged((model / name).read_bytes(), damage))
    tried(speak, folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@settings(PROFILE, max_examples=max(1, PROFILE.max_examples // 20))  # each is a process
@given(damage=DAMAGE, cuts=CUTS)
def test_templates(name: str, damage: Damage, cuts: list[Any], model: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(model)
    if name == "chat_template.jinja":
        replaced(folder / name, cut(TEMPLATE.encode(), cuts))
    else:
        replaced(folder / name, damaged((model / name).read_bytes(), damage))
    tried(lambda: TextCodec(folder).chat(HELLO))


@pytest.fixture(scope="module")
def ggufs(folder: Path) -> dict[str, WholeGguf]:
    """Models of several architectures and types of tensors."""
    found = {}
    for name, kind in GGUFS.items():
        make_toy(name, folder / name, **(SMALL if name in ("v2", "v3") else {}))
        file = folder / name / "model.gguf"
        write_gguf(folder / name, file, kind, split_kv_b=name != "v2")
        found[name] = WholeGguf(file)
    return found


@pytest.mark.parametrize("name", GGUFS)
@PROFILE
@given(damage=DAMAGE)
def test_gguf_models(name: str, damage: Damage, ggufs: dict[str, WholeGguf], folder: Path) -> None:
    tried(use, replaced(folder / "damaged.gguf", ggufs[name].damaged(damage)))


@pytest.mark.parametrize("vocabulary", [byte_level_metadata, sentencepiece_metadata])
@PROFILE
@given(damage=DAMAGE)
def test_gguf_vocabularies(vocabulary: Callable[[], dict[str, Any]], damage: Damage, folder: Path) -> None:
    tried(speak, replaced(folder / "damaged.gguf", damaged_metadata(vocabulary(), damage)))


@pytest.fixture(scope="module")
def traces(folder: Path) -> Path:
    """A folder with a trace in each form that can be read, called by its form."""
    chance, layers = np.random.default_rng(1), 3
    ids = np.argsort(chance.random((60, layers, 8)), axis=2)[:, :, :2].astype(np.int16)
    info = TraceInfo("toy", 4, (1, 2, 3), 8, 4096, tuple(tuple(range(8)) for _ in range(layers)))
    steps, numbers = np.arange(60, dtype=np.int32), np.zeros(60, np.int32)
    scores = chance.random((60, layers, 8)).astype(np.float16)
    trace = Trace(info, ids, numbers, steps, steps < 8, scores, np.tile(ids[:, :, None], (1, 1, 3, 1)))
    for form in ("tierlm", "npz", "jsonl"):
        convert(trace, folder / form, form)
    return folder


@pytest.mark.parametrize("form", ["tierlm", "npz", "jsonl"])
@PROFILE
@given(damage=DAMAGE, member=st.integers(0, 9))
def test_traces(form: str, damage: Damage, member: int, traces: Path, folder: Path) -> None:
    raw = (traces / form).read_bytes()
    content = damaged_lines(raw, damage) if form == "jsonl" else damaged_zip(raw, damage, member)
    file = replaced(folder / "trace", content)

    def replay() -> None:
        trace = read_trace(file, scores=True)
        assert len(list(trace.passes())) == len(trace.demands.prefill)
        RecordedHits(trace).rate(0.5)
        for other in ("jsonl", "oracle"):
            convert(trace, folder / "converted", other)

    tried(replay)


@pytest.mark.parametrize("name", ["heat", "disk"])
@PROFILE
@given(damage=DAMAGE)
def test_caches(name: str, damage: Damage, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that makes no sense is ignored: the model runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    catalog, cache = Catalog(model), folder / "cache" / "tierlm"
    if name == "heat":
        file, heat = cache / "heat" / f"{catalog.fingerprint}.json", Heat()
        for layer in catalog.spec.moe_layers:
            heat.note(layer, catalog.experts()[:2])
        heat.write(file)
    else:
        file = cache / "disk.json"
        ProfileCache(cache).put(model, DiskProfile(2**20, 4, 1e9, 1e-3))
    replaced(file, damaged(file.read_bytes(), damage))
    with limits(), LLM.load(model, budget=Budget("8GiB"), ram_slots=2, policy="hazard") as llm:
        assert len(llm.generate([3, 5, 7], SamplingParams(max_new_tokens=2, ignore_eos=True))[0].ids) == 2


@PROFILE
@given(damage=DAMAGE)
def test_profiles(damage: Damage, folder: Path) -> None:
    rate = Spread(3e9, 2e9, 4e9)
    disk = DiskRate("/", "sda", "direct", "random", 2**20, 8, rate, (1e-3, 2e-3, 3e-3), 1.0)
    Profile(
        *("today", "a processor", 2, 2**34, 2**34),
        memory=[MemoryRate("ram", 2**34, 2, 0, 2, rate, rate, rate)],
        disks=[disk],
        disk_capacity={"/": 2**40},
        kernels=[KernelRate("bf16", 1, 2, rate), KernelRate("bf16", 64, 2, rate)],
        links=dict.fromkeys(("pinned to device", "device memory", "device products"), rate),
        beside=(0.8, 0.8),
        beside_many=(0.8, 0.8),
        layer=1e-3,
        record=1e-4,
        touch=(1e-9, 1e-9),
        start=3.0,
    ).write(folder / "whole.json")
    file = replaced(folder / "profile.json", damaged((folder / "whole.json").read_bytes(), damage))
    tried(partial(plan, vram="1GiB", machine=file, prompt=16, json=STDOUT), "demo", "8GiB")
