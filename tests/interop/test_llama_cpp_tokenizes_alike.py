"""llama.cpp's tokenizer gives the ids of the converted one, but for pieces of which its converter knows nothing."""

import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from llama_cpp import Llama
from runtime import run_converter
from test_tokenizer_equals_sentencepiece import hard_strings
from transformers import AutoTokenizer

from grok1.conversion.tokenizer import USER_DEFINED, convert_tokenizer, read_sentencepiece
from modeling_grok1 import GrokConfig


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo"
# User-defined, and not reachable by merging two other pieces as the 43 others are.
MARKER = re.compile(r"<\|(?:separator|mask|control(?:1?[0-9]|20))\|>")


@pytest.fixture(scope="module", params=["demo", "release"])
def source(request) -> Path:
    return (
        DEMO / "tokenizer.model" if request.param == "demo" else request.getfixturevalue("assets") / "tokenizer.model"
    )


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    """A folder with a tokenizer and a config, which is all that a vocabulary needs."""
    out = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(source, out)
    convert_tokenizer(source, out)
    GrokConfig(vocab_size=len(read_sentencepiece(source).pieces)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def llama(folder, tmp_path_factory) -> Llama:
    gguf = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    done = run_converter(folder, gguf, "--vocab-only")
    assert done.returncode == 0, done.stderr
    return Llama(str(gguf), vocab_only=True, verbose=False)


def tokenize(llama: Llama, text: str) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=True, special=False)


def test_ids_are_equal_over_hard_strings_without_markers(folder, llama, measured):
    strings = [text for text in hard_strings() if not MARKER.search(text)]
    ids = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)(strings)["input_ids"]
    differ = [text[:80] for text, expected in zip(strings, ids, strict=True) if tokenize(llama, text) != expected]
    measured(f"{len(strings)} strings without a marker: {len(differ)} with other ids")
    assert len(strings) > 5000
    assert differ == []


def test_markers_are_ordinary_text_to_llama_cpp(source, llama, measured):
    """
    The converter knows no user-defined pieces and stores them as normal ones. Spaces, line ends, tabs and digits are
    found all the same; the markers are not. Declared unused, SentencePiece cuts them up in the same way.
    """
    assert sum(bool(MARKER.fullmatch(piece)) for piece in read_sentencepiece(source).texts(USER_DEFINED)) == 22
    proto = source.read_bytes()
    piece = rb"(\x0a.(?:" + MARKER.pattern.encode() + rb")\x15.{4}\x18)\x04"  # text, score, type
    without, changed = re.subn(piece, lambda found: found[1] + b"\x05", proto, flags=re.DOTALL)
    assert changed == 22
    reference = sentencepiece.SentencePieceProcessor(model_proto=without)
    strings = [text for text in hard_strings() if MARKER.search(text)]
    assert len(strings) > 500
    differ = [text[:80] for text in strings if tokenize(llama, text) != reference.encode(text)]
    measured(f"{len(strings)} strings with a marker: {len(strings)} with other ids, {len(differ)} of them unexplained")
    assert differ == []


def test_the_spelling_of_a_special_token_is_text_unless_asked_for(folder, llama):
    """llama.cpp's programs read prompts with `special=True`, as some of llama-cpp-python's methods do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for spelling, token in (("[PAD]", 0), ("[BOS]", 1), ("[EOS]", 2)):
        text = f"a{spelling}b"
        assert tokenize(llama, text) == tokenizer(text, split_special_tokens=True)["input_ids"]
        assert token not in tokenize(llama, text)
        assert token in llama.tokenize(text.encode(), special=True) and token in tokenizer(text)["input_ids"]
