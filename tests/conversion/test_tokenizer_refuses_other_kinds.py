"""A tokenizer that could not be reproduced id for id is refused, with every reason, and nothing is written."""

import io
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok1.conversion.tokenizer import NORMAL, Piece, SentencePieceModel, build_tokenizer, convert_tokenizer
from grok1.errors import ConversionError


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo" / "tokenizer.model"
LIKE_XAI = {
    "model_type": "bpe",
    "byte_fallback": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
}


def model_file(folder: Path, **options) -> Path:
    """A small SentencePiece model with xAI's options, but for the given ones."""
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog", "how now brown cow", "pack my box with five dozen jugs"]
    options = {"vocab_size": 330, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False} | LIKE_XAI | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **options)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def refusal(path: Path, out: Path, vocab_size: int | None = None) -> ConversionError:
    with pytest.raises(ConversionError) as caught:
        convert_tokenizer(path, out, vocab_size)
    assert str(path) in str(caught.value)
    assert not out.exists()
    return caught.value


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": "unigram"}, "model type: expected bpe, found unigram"),
        ({"model_type": "char", "vocab_size": 300}, "model type: expected bpe, found char"),
        ({"byte_fallback": False, "vocab_size": 70}, "found byte fallback off"),
        ({"bos_id": 2, "eos_id": 1, "unk_id": 0, "pad_id": 3}, "id 0: expected the pad token, found '<unk>'"),
        ({"control_symbols": ["<extra>"]}, "expected ids 0 to 3 only, found 4 ('<extra>')"),
        ({"normalization_rule_name": "nfkc"}, "normalization rules: expected identity, found a character map"),
        ({"add_dummy_prefix": False}, "add_dummy_prefix: expected True, found False"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces: expected False, found True"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix: expected False, found True"),
    ],
)
def test_each_other_kind_is_named(tmp_path, options, problem):
    convert_tokenizer(model_file(tmp_path), tmp_path / "like xAI's")  # the option alone makes the difference
    error = refusal(model_file(tmp_path, **options), tmp_path / "out")
    assert any(problem in line for line in error.problems), error.problems


def test_more_pieces_than_the_vocabulary(tmp_path):
    error = refusal(DEMO, tmp_path / "out", vocab_size=1000)
    assert error.problems == ["pieces: expected at most the model's vocabulary of 1000, found 1024"]
    convert_tokenizer(DEMO, tmp_path / "out", vocab_size=1024)


def test_all_problems_come_at_once(tmp_path):
    options = {"model_type": "unigram", "add_dummy_prefix": False, "normalization_rule_name": "nfkc"}
    error = refusal(model_file(tmp_path, **options), tmp_path / "out", vocab_size=10)
    assert len(error.problems) == 4


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a model", DEMO.read_bytes()[:5000]])
def test_a_file_that_is_not_a_model(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert f"found {len(content)} bytes that are not one" in str(refusal(path, tmp_path / "out"))


def test_a_file_that_is_not_there(tmp_path):
    assert "No such file" in str(refusal(tmp_path / "nowhere", tmp_path / "out"))


def test_pieces_that_no_merge_makes():
    """`ignore_merges` would give such a piece where SentencePiece does not."""
    pieces = [Piece(f"[{i}]", 0.0, 2 if i == 3 else 3) for i in range(4)]
    pieces += [Piece(text, -float(i), NORMAL) for i, text in enumerate(("a", "b", "ab", "abba"))]
    with pytest.raises(ConversionError, match="1 normal pieces that no sequence of merges makes: 'abba'"):
        build_tokenizer(SentencePieceModel(pieces))


def test_the_three_files_replace_older_ones_and_nothing_else_is_left(tmp_path):
    for name in ("tokenizer.model", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "tokenizer.model").write_bytes(DEMO.read_bytes())
    convert_tokenizer(tmp_path / "tokenizer.model", tmp_path)  # onto itself
    names = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "tokenizer.model").read_bytes() == DEMO.read_bytes()
    assert (tmp_path / "config.json").read_text() == "old"


@cache
def small_model() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return model_file(Path(folder)).read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, changes):
    """Bytes that are replaced, removed or added, wherever: fields then have other types, lengths and numbers."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "tokenizer.model"
    data = bytearray(small_model())
    for place, removed, added in changes:
        start = int(place * len(data))
        data[start : start + removed] = added
    path.write_bytes(data)
    try:
        convert_tokenizer(path, folder / "out")
    except ConversionError as error:
        assert str(path) in str(error) or "tokenizer" in str(error)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "tokenizer.model")
    assert "cannot be read" in str(refusal(tmp_path / "tokenizer.model", tmp_path / "out"))
