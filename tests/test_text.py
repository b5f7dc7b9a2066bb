"""Text to ids and back, and streamed text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tierlm.errors import CheckpointError, UsageError
from tierlm.text import TextCodec, TextStream

PROFILE = settings(deadline=None, derandomize=True, max_examples=150)
BOS, EOS = "<|begin|>", "<|end|>"
CORPUS = ["the quick brown fox jumps over the lazy dog. " * 3, "STOP stopping <stop> stops", "naïve Füße 日本語 🙂🙃"]
VOCAB = 330


def train_tokenizer(*, adds_bos: bool = False) -> Tokenizer:
    """A byte-level BPE of a few merges: rare characters are several tokens, frequent words one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        bos = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def make_codec(folder: Path, *, adds_bos: bool = False, **config: Any) -> TextCodec:
    train_tokenizer(adds_bos=adds_bos).save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextCodec(folder)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return make_codec(tmp_path_factory.mktemp("codec"))


def pieces_of(codec: TextCodec, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What a stream shows, piece by piece, the flush last; like the engine, it pushes nothing after a stop."""
    stream, pieces = TextStream(codec, stop), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    return pieces, stream


# --- streaming

TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("aé日🙂🏽\u200d👩👧\u0301\u0308ﬀ\ufffd \n\0"), max_size=30),
    st.lists(st.sampled_from([*CORPUS[0].split(), " ", "🏳️‍🌈", "e\u0301", "🇩🇪", "한글"]), max_size=12).map(" ".join),
)


@PROFILE
@given(text=TEXTS)
@example(text="👩‍👧 e\u0301 🏳️‍🌈")
@example(text="\ufffd")
@example(text="a\ufffd\ufffdb")
def test_pieces_are_the_text(codec: TextCodec, text: str) -> None:
    ids = codec.encode(text)
    assert codec.decode(ids) == text
    pieces, stream = pieces_of(codec, ids)
    assert "".join(pieces) == text == stream.text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert not stream.stopped


@PROFILE
@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_pieces_of_any_ids_are_what_they_decode_to(codec: TextCodec, ids: list[int]) -> None:
    """Random ids are rarely valid UTF-8: incomplete characters become U+FFFD, as many as in one decode."""
    pieces, stream = pieces_of(codec, ids)
    assert "".join(pieces) == codec.decode(ids) == stream.text


def test_half_a_character_is_held_back(codec: TextCodec) -> None:
    ids = codec.encode("x🦖")  # the dinosaur is not in the corpus: several tokens
    assert len(ids) > 2
    stream = TextStream(codec, ())
    assert [stream.push(token) for token in ids] == ["x", *[""] * (len(ids) - 2), "🦖"]
    assert stream.flush() == ""


def test_half_a_character_at_the_end_is_shown_by_flush(codec: TextCodec) -> None:
    ids = codec.encode("x🦖")[:-1]
    pieces, _ = pieces_of(codec, ids)
    assert pieces[-1] == "\ufffd" and "".join(pieces) == codec.decode(ids)


def test_special_tokens_are_not_text(codec: TextCodec) -> None:
    bos, eos = codec.tokenizer.token_to_id(BOS), codec.tokenizer.token_to_id(EOS)
    ids = [bos, *codec.encode("a🦖"), bos, eos, *codec.encode("b")]
    pieces, _ = pieces_of(codec, ids)
    assert "".join(pieces) == "a🦖b"
    stream = TextStream(codec, (), special=True)
    assert "".join(map(stream.push, ids)) + stream.flush() == f"{BOS}a🦖{BOS}{EOS}b"


def test_flush_twice_shows_nothing_twice(codec: TextCodec) -> None:
    stream = TextStream(codec, ("ox!",))
    shown = "".join(stream.push(token) for token in codec.encode("fox"))
    assert shown == "f" and stream.flush() == "ox" and stream.flush() == ""
    assert stream.text == "fox"


def test_space_before_a_word_is_kept_where_the_decoder_strips_the_first(tmp_path: Path) -> None:
    """SentencePiece style: a token alone loses the space before its word; after other tokens it keeps it."""
    vocabulary = {"▁the": 0, "▁quick": 1, "▁fox": 2, "es": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="es"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pieces, _ = pieces_of(TextCodec(tmp_path), [0, 1, 2, 3, 0])
    assert pieces == ["the", " quick", " fox", "es", " the", ""]


# --- stop texts


@PROFILE
@given(text=TEXTS.filter(lambda text: "\ufffd" not in text), data=st.data())
def test_a_stop_text_and_what_follows_are_never_shown(codec: TextCodec, text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    stop = text[start : data.draw(st.integers(start, len(text)))] or "never"
    pieces, stream = pieces_of(codec, codec.encode(text), [stop])
    assert "".join(pieces) == stream.text == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


@PROFILE
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_that_overlap_themselves(codec: TextCodec, text: str, stops: list[str]) -> None:
    pieces, stream = pieces_of(codec, codec.tokenizer.encode(text).ids, stops)
    shown = "".join(pieces)
    assert text.startswith(shown) and not any(stop in shown for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)
    if not stream.stopped:
        assert shown == text
    else:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    if len(stops) == 1:
        assert shown == text.partition(stops[0])[0]


def test_a_stop_text_of_several_tokens_is_held_back_token_by_token(codec: TextCodec) -> None:
    stop = "🦖 zqx"
    ids = codec.encode("fox" + stop + "the dog")
    assert len(codec.encode(stop)) > 4
    stream, shown = TextStream(codec, [stop]), ""
    for token in ids:
        shown += stream.push(token)
        assert "fox".startswith(shown)
    assert shown == "fox" and stream.stopped and stream.flush() == ""


def test_what_only_began_like_a_stop_text_is_shown(codec: TextCodec) -> None:
    pieces, stream = pieces_of(codec, codec.encode("zq zq zqx zq"), ["zq zqy"])
    assert "".join(pieces) == "zq zq zqx zq" and not stream.stopped


def test_nothing_is_shown_after_a_stop(codec: TextCodec) -> None:
    stream = TextStream(codec, ["dog"])
    shown = "".join(stream.push(token) for token in codec.encode("the dog, the fox"))
    assert shown == stream.text == "the " and stream.stopped and stream.flush() == ""


def test_a_stop_text_inside_one_token(codec: TextCodec) -> None:
    (token,) = codec.encode(" quick")
    stream = TextStream(codec, ["ui"])
    assert stream.push(token) == " q" and stream.stopped


# --- tokenizer


@pytest.mark.parametrize("processor_adds_bos", [False, True])
@pytest.mark.parametrize("bos", [BOS, {"content": BOS, "lstrip": False}], ids=["text", "object"])
def test_bos_is_put_once(tmp_path: Path, processor_adds_bos: bool, bos: Any) -> None:
    codec = make_codec(tmp_path, adds_bos=processor_adds_bos, add_bos_token=True, bos_token=bos)
    begin = codec.tokenizer.token_to_id(BOS)
    plain = codec.encode("the fox", special=False)
    assert begin not in plain
    assert codec.encode("the fox") == [begin, *plain]
    assert codec.encode("") == [begin]
    assert codec.encode(f"{BOS}the fox", special=False) == [begin, *plain]


def test_bos_is_not_put_unasked(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, add_bos_token=False, bos_token=BOS)
    assert codec.encode("the fox") == codec.encode("the fox", special=False)
    assert codec.tokenizer.token_to_id(BOS) not in codec.encode("the fox")


def test_bos_that_is_no_unicode(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, add_bos_token=True, bos_token="\ud800")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        codec.encode("the")


def test_bos_that_the_vocabulary_lacks_is_left_out(tmp_path: Path) -> None:
    codec = make_codec(tmp_path, add_bos_token=True, bos_token="<|other|>")
    assert codec.encode("the fox") == codec.encode("the fox", special=False)


def test_missing_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="token ids") as caught:
        TextCodec(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "rubbish"])
def test_broken_tokenizer_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        TextCodec(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        ("model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        ("model", {"type": "Unigram", "unk_id": 7, "vocab": [["a", float("nan")]]}),
        ("model", {"type": "WordPiece", "vocab": [], "unk_token": 3}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("decoder", 5),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}),
        ("added_tokens", {"id": "x"}),
    ],
)
def test_tokenizers_of_wrong_types(part: str, value: Any, tmp_path: Path) -> None:
    """Some make the library's Rust code panic."""
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(train_tokenizer().to_str()) | {part: value}))
    with pytest.raises(CheckpointError, match="tokenizer"):
        TextCodec(tmp_path).encode("the quick brown fox")


def test_a_tokenizer_that_pads_and_cuts_does_neither(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    expected = tokenizer.encode(CORPUS[0]).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10**9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextCodec(tmp_path).encode(CORPUS[0]) == expected


def test_broken_tokenizer_config_names_the_file(tmp_path: Path) -> None:
    make_codec(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        TextCodec(tmp_path)
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)


def test_text_that_is_not_unicode_is_a_usage_error(codec: TextCodec) -> None:
    """What Python makes of a command line that is not UTF-8."""
    with pytest.raises(UsageError):
        codec.encode("caf\udce9")
