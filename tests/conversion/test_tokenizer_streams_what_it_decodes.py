"""Tokens streamed one by one give the text that they decode to, characters split over tokens included."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer

from grok1.conversion.tokenizer import convert_tokenizer
from grok1.serving.text_streaming import LineTextIteratorStreamer, LineTextStreamer


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo" / "tokenizer.model"
TEXTS = [
    "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n\nGLOUCESTER:\n",
    "日本語のテキスト、漢字と仮名。統一 한국어 mixed 𠀀𪛟 end",
    "你😀好😀😀 👩‍👩‍👧‍👦🇨🇭 ❤️ é e\u0301 naïve Привет שלום مرحبا",
    "if x:\n    return 0\n\n\n        y\n\tz\n # a\n  \n",
    "  two spaces in front, and behind  ",
    "[PAD] <s> <|mask|>\x00\ufeff\u200d tabs\t\t\n",
    "\n",
    " \n \n  \n",
    "a",
]


@pytest.fixture(scope="module", params=["demo", "release"])
def tokenizer(request, tmp_path_factory):
    source = DEMO if request.param == "demo" else request.getfixturevalue("assets") / "tokenizer.model"
    folder = tmp_path_factory.mktemp(request.param)
    convert_tokenizer(source, folder)
    return AutoTokenizer.from_pretrained(folder)


def iterated(streamer, ids: list[int], prompt: int) -> str:
    streamer.put(torch.tensor([ids[:prompt]]))
    for token in ids[prompt:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(streamer)


@pytest.mark.parametrize("prompt", [1, 3])
def test_streamed_text_is_the_decoded_text(tokenizer, prompt):
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert iterated(LineTextIteratorStreamer(tokenizer), ids, prompt) == text
        assert iterated(LineTextIteratorStreamer(tokenizer, skip_special_tokens=True), ids, prompt) == text


def test_a_skipped_prompt_leaves_what_follows_it(tokenizer):
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for prompt in range(1, len(ids)):
            said = tokenizer.decode(ids[:prompt])
            if text.startswith(said):  # the cut is not inside a character
                assert (
                    iterated(LineTextIteratorStreamer(tokenizer, skip_prompt=True), ids, prompt) == text[len(said) :]
                )


def test_the_printing_streamer_prints_it(tokenizer, capsys):
    for text in TEXTS:
        streamer = LineTextStreamer(tokenizer)
        for token in tokenizer(text)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert capsys.readouterr().out == text + "\n"


def test_transformers_own_streamers_lose_one_space_a_line_and_nothing_else(tokenizer, capsys):
    """They flush after a newline, and decoding what follows cannot know that its space is not the dummy prefix."""
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        expected = re.sub("\n ", "\n", text)
        assert iterated(TextIteratorStreamer(tokenizer), ids, 1) == expected
        streamer = TextStreamer(tokenizer)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert capsys.readouterr().out == expected + "\n"


def test_text_comes_while_it_is_generated(tokenizer):
    """Whole words are given out as soon as the next one begins."""
    streamer = LineTextIteratorStreamer(tokenizer)
    for token in tokenizer("one two three four")["input_ids"]:
        streamer.put(torch.tensor([token]))
    assert "".join(streamer.text_queue.queue).startswith("one two ")
