"""GGUF files: twins of the toys give the toys' logits; damaged ones give errors of ours."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from made_damaged_gguf import WholeGguf, gguf_header
from made_gguf import sentencepiece_metadata, write_gguf
from tokenizers import Tokenizer
from toys import GQA, TOYS, YARN, edit_config, make_toy
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tierlm import LLM, Budget, CheckpointError, UnsupportedModelError, UsageError
from tierlm.checkpoints.gguf_config import config_of
from tierlm.checkpoints.gguf_header import read_gguf_header
from tierlm.checkpoints.gguf_tokenizer import tokenizer_config_of, tokenizer_of
from tierlm.checkpoints.hub import DEMO
from tierlm.models.catalog import Catalog
from tierlm.models.packing import pack_model
from tierlm.spec import ExpertKey
from tierlm.text import TextCodec

IDS = [3, 5, 7, 100, 4, 9, 33, 2]
UNEQUAL = {"v2-yarn", "v3-yarn"}  # llama.cpp's metadata has one mscale for both
# llama.cpp cannot express them; or safetensors have other matrices, whose products are summed in another order.
NO_TWIN = {
    "v3-half-rope",
    "v32",
    "v32-sparse",
    "glm5-sparse",
    "qwen3-dense-between",
    "qwen3-every-other",
    "gpt-oss",
}
NO_TWIN |= {"qwen3-next", "qwen35"}


def logits(path: Path, ids: list[int] = IDS) -> torch.Tensor:
    with LLM.load(path, budget=Budget("2GiB"), heat=False, probe="off") as llm:
        return llm.logits(ids)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    more: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": 0}
    config = LlamaConfig(**sizes, **more, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    make_toy("qwen3", folder)
    write_gguf(folder, folder / "model.gguf")
    return folder / "model.gguf"


@pytest.mark.parametrize("name", sorted(set(TOYS) - NO_TWIN))
def test_a_twin_in_float32_gives_the_same_bits(originals: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """kv_b_proj in two halves is summed in another order."""
    folder = originals(name)
    if name in UNEQUAL:
        make_toy(name, tmp_path, rope_parameters={**YARN, "mscale": 0.9})
        folder = tmp_path
    write_gguf(folder, tmp_path / "whole.gguf", split_kv_b=False)
    expected = logits(folder)
    assert torch.equal(logits(tmp_path / "whole.gguf"), expected)
    write_gguf(folder, tmp_path / "split.gguf")
    assert torch.allclose(logits(tmp_path / "split.gguf"), expected, rtol=0, atol=1e-4)


def test_sparse_attention(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """The published files have an indexer in every layer."""
    make_toy("glm5", tmp_path, index_topk=5)
    write_gguf(tmp_path, tmp_path / "model.gguf", split_kv_b=False)
    expected = logits(tmp_path)
    assert torch.equal(logits(tmp_path / "model.gguf"), expected)
    assert not torch.allclose(logits(originals("glm5")), expected, atol=1e-2)


@pytest.mark.parametrize(("name", "architecture"), [("qwen3", "qwen3vlmoe")])
def test_text_of_multi_modal_files(
    originals: Callable[[str], Path], tmp_path: Path, name: str, architecture: str
) -> None:
    write_gguf(originals(name), tmp_path / "model.gguf", architecture=architecture)
    assert torch.equal(logits(tmp_path / "model.gguf"), logits(originals(name)))


def test_gpt_oss(tmp_path: Path) -> None:
    """Sinks, windows, biases, clamped experts; in one chunk and in chunks smaller than the window."""
    reference = make_toy("gpt-oss", tmp_path)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS * 2])).logits[0]
    write_gguf(tmp_path, tmp_path / "model.gguf")
    for options in ({}, {"prefill_chunk": 3}):
        with LLM.load(tmp_path / "model.gguf", heat=False, probe="off", **options) as llm:
            assert torch.allclose(llm.logits(IDS * 2), expected, rtol=0, atol=1e-4)


def test_gemma_3(tmp_path: Path) -> None:
    """One is added to the norms when the file is written, so the last bits differ."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    }
    sizes = {name: GQA[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = Gemma3TextConfig(
        **sizes, sliding_window=4, query_pre_attn_scalar=16, rope_parameters=rope, initializer_range=0.2
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).eval().save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf")
    assert torch.allclose(logits(tmp_path / "model.gguf", IDS * 2), logits(tmp_path, IDS * 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3-next", "qwen35"])
def test_gated_deltanet(originals: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Norms, the decay and the order of value heads differ from safetensors, so the last bits do."""
    write_gguf(originals(name), tmp_path / "model.gguf")
    found, expected = logits(tmp_path / "model.gguf", IDS * 9), logits(originals(name), IDS * 9)
    assert torch.allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("key", ["block_count", "ssm.inner_size", "rope.dimension_count"])
def test_metadata_of_other_types(key: str) -> None:
    metadata = {"general.architecture": "qwen35moe", f"qwen35moe.{key}": "many"}
    with pytest.raises(CheckpointError, match="here: expected numbers in the metadata"):
        config_of(metadata, {}, "here")


def test_rope_divisors_of_llama_3(llama: Path, tmp_path: Path) -> None:
    """GGUF has the divisors in a tensor."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    table = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    edit_config(folder, rope_parameters=table)
    divisors = Catalog(folder).spec.layers[0].attention.rope.divisors
    write_gguf(folder, tmp_path / "model.gguf", extra={"rope_freqs.weight": divisors})
    assert len(set(divisors)) > 2 and torch.equal(logits(tmp_path / "model.gguf", IDS * 9), logits(folder, IDS * 9))


def test_dense_llama_at_budgets_below_its_size(llama: Path, tmp_path: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0]
    assert torch.allclose(logits(llama), expected, rtol=0, atol=1e-4)
    write_gguf(llama, tmp_path / "model.gguf")
    assert torch.equal(logits(tmp_path / "model.gguf"), logits(llama))
    for resident in (0, 2):
        with LLM.load(tmp_path / "model.gguf", resident_trunks=resident, heat=False, probe="off") as llm:
            assert torch.equal(llm.logits(IDS), logits(llama))
            assert llm.generate(IDS)[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_floats_of_two_bytes(qwen: Path, tmp_path: Path, kind: Type) -> None:
    write_gguf(qwen.parent, tmp_path / "model.gguf", kind)
    found = logits(tmp_path / "model.gguf")
    assert 0 < (found - logits(qwen)).abs().max() < 0.1


def test_an_expert_is_three_slices_of_stacks(qwen: Path) -> None:
    catalog, reader = Catalog(qwen), gguf.GGUFReader(qwen)
    stacks = {tensor.name: tensor for tensor in reader.tensors}
    record = catalog.record(ExpertKey(2, 5))
    for extent in record.extents:
        for part in extent.tensors:
            stack = stacks[part.name]
            assert (part.offset, part.nbytes) == (stack.data_offset + 5 * stack.n_bytes // 16, stack.n_bytes // 16)
    assert sum(len(extent.tensors) for extent in record.extents) == 3


def test_split_files(qwen: Path, tmp_path: Path) -> None:
    parts = split(qwen, tmp_path, 3)
    assert torch.equal(logits(parts[0]), logits(qwen))
    with pytest.raises(CheckpointError, match=r"part 1 of 3.*00001-of"):
        Catalog(parts[1])
    parts[2].rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="missing part 3 of 3"):
        Catalog(parts[0])
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match="is not part 3 of 3"):
        Catalog(parts[0])


def split(file: Path, folder: Path, count: int) -> list[Path]:
    """``file`` in ``count`` files, as llama-gguf-split writes them: all metadata in the first."""
    reader = gguf.GGUFReader(file)
    found = []
    for part in range(count):
        found.append(folder / f"model-{part + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(found[-1], "qwen3moe")
        for field in reader.fields.values() if part == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kinds = field.types
                sub = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kinds[0], sub)
        writer.add_key_value("split.no", part, gguf.GGUFValueType.UINT16)
        writer.add_key_value("split.count", count, gguf.GGUFValueType.UINT16)
        for tensor in reader.tensors[part::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return found


@pytest.mark.parametrize("name", ["v3", "qwen3"])
def test_a_pack_of_a_gguf_file(originals: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Config and tokenizer come from the metadata."""
    file, out = tmp_path / "model.gguf", tmp_path / "packed"
    write_gguf(originals(name), file)
    pack_model(file, out, experts="keep", trunk="keep")
    assert torch.equal(logits(out), logits(file))
    assert TextCodec(out).decode([5, 6]) == "<5><6>"
    with pytest.raises(UsageError, match="exists already"):
        pack_model(file, out, experts="keep", trunk="keep")


def test_header_says_what_the_library_reads(qwen: Path) -> None:
    header, reader = read_gguf_header(qwen), gguf.GGUFReader(qwen)
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (found.kind, found.offset, found.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            assert header.metadata[field.name] == field.contents()


# --- damaged files


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_headers_are_errors_of_ours(
    qwen: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = qwen.read_bytes()
    end = min(tensor.offset for tensor in read_gguf_header(qwen).tensors.values())
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        damaged[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    file = tmp_path_factory.mktemp("damaged") / "model.gguf"
    file.write_bytes(damaged)
    try:
        catalog = Catalog(file)
    except CheckpointError:
        return
    assert catalog.spec.vocab > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", "x"), ("block_count", [1]), ("rope.freq_base", 1e308)],
)
def test_metadata_of_another_type(key: str, value: Any, qwen: Path, tmp_path: Path) -> None:
    whole, file = WholeGguf(qwen), tmp_path / "model.gguf"
    whole.header["metadata"][f"qwen3moe.{key}"] = value
    file.write_bytes(whole.written())
    with pytest.raises(CheckpointError):
        Catalog(file)


def test_a_tensor_without_dimensions(qwen: Path, tmp_path: Path) -> None:
    whole, file = WholeGguf(qwen), tmp_path / "model.gguf"
    next(each for each in whole.header["tensors"] if each[0] == "token_embd.weight")[1] = []
    file.write_bytes(whole.written())
    with pytest.raises(CheckpointError, match="malformed metadata"):
        Catalog(file)


def test_counts_that_would_take_much_memory(tmp_path: Path) -> None:
    """A byte of an array would become eight or more, a pair of metadata some two hundred."""
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_header({"x": [0] * (2**22 + 1)}))
    with pytest.raises(CheckpointError, match="at most 4194304 items of arrays, found 4194305"):
        read_gguf_header(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**18) + bytes(13 * 2**18))
    with pytest.raises(CheckpointError, match="at most 131072 tensors, and keys, found 0 and 262144"):
        read_gguf_header(file)


def test_truncated_file(qwen: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(qwen.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated.*ends at byte"):
        Catalog(file)
    file.write_bytes(qwen.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        Catalog(file)


def test_architecture_that_is_unknown(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported; supported are deepseek2"):
        Catalog(tmp_path / "model.gguf")


def test_layers_past_the_last_are_ignored(originals: Callable[[str], Path], tmp_path: Path) -> None:
    write_gguf(originals("v3"), tmp_path / "model.gguf", nextn_predict_layers=1)
    catalog = Catalog(tmp_path / "model.gguf")
    assert len(catalog.spec.layers) == 3 and all(name.startswith("blk.3.") for name in catalog.ignored)
    assert len(catalog.ignored) > 10


# --- tokenizers

TEXT = "Don't 12345 tell \n\n  def f(x):  # naïve 日本語 😀🏽\t\r\n'S"


def demo_metadata() -> dict[str, Any]:
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    types = [3 if token.startswith("<|") else 1 for token in tokens]
    return {f"tokenizer.ggml.{name}": value for name, value in {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges, "token_type": types, "eos_token_id": 0,
    }.items()}  # fmt: skip


def test_byte_level_vocabulary() -> None:
    known = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    found = tokenizer_of(demo_metadata(), "here")
    for text in (TEXT, (DEMO / "heldout-python-docs.txt").read_text()[:5000]):
        ids = found.encode(text, add_special_tokens=False).ids
        assert found.decode(ids, skip_special_tokens=False) == text
        assert ids == known.encode(text, add_special_tokens=False).ids


def test_sentencepiece_vocabulary() -> None:
    metadata = sentencepiece_metadata()
    pieces = metadata["tokenizer.ggml.tokens"]
    found = tokenizer_of(metadata, "here")
    ids = found.encode("ab c é<s>", add_special_tokens=False).ids
    tokens = [pieces[number] for number in ids]
    assert tokens == ["▁ab", "▁", "c", "▁", "<0xC3>", "<0xA9>", "<s>"]
    assert found.decode(ids, skip_special_tokens=True) == "ab c é"
    assert tokenizer_config_of(metadata) == {"add_bos_token": True, "chat_template": None, "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("tokens", None, "no tokenizer"),
        ("tokens", [1, 2], "no tokenizer"),
        ("model", "bert", "'bert' is not supported"),
        ("pre", "unheard-of", "'unheard-of' is not supported"),
        ("merges", ["zzz qqq"], "malformed"),
        ("merges", [1], "malformed"),
        ("token_type", [1], "malformed"),
    ],
)
def test_malformed_vocabularies(key: str, value: Any, error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        tokenizer_of(demo_metadata() | {f"tokenizer.ggml.{key}": value}, "here")


def test_pieces_too_long_to_be_cut_in_two_everywhere() -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"][-1] = "a" * 10**5
    with pytest.raises(CheckpointError, match="malformed tokenizer: the pieces are too long"):
        tokenizer_of(metadata, "here")


def test_text_in_text_out(llama: Path, tmp_path: Path) -> None:
    edit_config(llama, vocab_size=131)
    write_gguf(llama, tmp_path / "model.gguf")
    codec = TextCodec(tmp_path / "model.gguf")
    assert codec.decode([5, 6]) == "<5><6>" and codec.encode("<") == []
