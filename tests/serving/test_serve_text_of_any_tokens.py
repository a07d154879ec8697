"""The text of a choice, piece by piece: that of its tokens, up to a stop string, whatever bytes the tokens are."""

import random

import pytest
from transformers import AutoTokenizer

from grok1.conversion.tokenizer import convert_tokenizer
from grok1.demo.passages import bundled_checkpoint
from grok1.serving.text import Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with bundled_checkpoint() as checkpoint:
        convert_tokenizer(checkpoint / "tokenizer.model", folder, continuations=True)
    return AutoTokenizer.from_pretrained(folder)


def said(tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> str:
    text = Text(tokenizer, stops)
    return "".join([*(text.add(token) for token in ids), text.finish()])


@pytest.mark.parametrize("words", ["Now is the winter", " naïve 日本語 🙂 \t\n  end", "a"])
def test_it_is_what_the_tokens_decode_to(tokenizer, words):
    ids = tokenizer(words)["input_ids"]
    assert said(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_string_ends_it_wherever_tokens_end(tokenizer):
    ids = tokenizer("one two three four")["input_ids"]
    assert said(tokenizer, ids, ("o thr",)) == tokenizer.decode(ids).partition("o thr")[0]


def test_random_tokens_never_fail_and_lose_no_character(tokenizer):
    """Bytes in any order: each that belongs to no character is one U+FFFD, and what was given is never taken back."""
    generator = random.Random(0)
    letters = tokenizer("abc")["input_ids"]
    byte = [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)]
    assert len(set(byte)) == 256
    for _ in range(300):
        ids = [generator.choice([*byte, *letters * 20]) for _ in range(20)]
        expected = sum(token in letters for token in ids)
        text = said(tokenizer, ids)
        assert len(text) >= expected and text.encode("utf-8").decode("utf-8") == text
    assert said(tokenizer, [*letters, byte[0xE5], *letters]).count("\N{REPLACEMENT CHARACTER}") == 1
