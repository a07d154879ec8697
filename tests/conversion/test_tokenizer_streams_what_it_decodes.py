"""Transformers' streamers give the text that the tokens decode to, one token at a time, split characters included.
They decode each line separately, so they need the additive decoder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer

from grok1.conversion.tokenizer import convert_tokenizer
from modeling_grok1.pipeline_grok1 import continuation_tokenizer


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo" / "tokenizer.model"
TEXTS = [
    "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n\nGLOUCESTER:\n",
    "日本語のテキスト、漢字と仮名。統一 한국어 mixed 𠀀𪛟 end",
    "你😀好😀😀 👩‍👩‍👧‍👦🇨🇭 ❤️ é e\u0301 naïve Привет שלום مرحبا",
    "if x:\n    return 0\n\n\n        y\n\tz\n # a\n  \n",
    "  two spaces in front, and behind  ",
    "a [PAD] <s> <|mask|>\x00\ufeff\u200d tabs\t\t\n",
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


@pytest.fixture(scope="module")
def additive(tokenizer):
    return continuation_tokenizer(tokenizer)


def iterated(additive, ids: list[int], prompt: int, **options) -> str:
    streamer = TextIteratorStreamer(additive, **options)
    streamer.put(torch.tensor([ids[:prompt]]))
    for token in ids[prompt:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return "".join(streamer)


@pytest.mark.parametrize("prompt", [1, 3])
def test_streamed_text_is_the_decoded_text(tokenizer, additive, prompt):
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert iterated(additive, ids, prompt) == f" {text}"
        assert iterated(additive, ids, prompt, skip_special_tokens=True) == f" {text}".replace("[PAD]", "")


def test_a_skipped_prompt_leaves_what_follows_it(tokenizer, additive):
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for prompt in range(1, len(ids)):
            said = tokenizer.decode(ids[:prompt])
            if text.startswith(said):  # the cut is not inside a character
                assert iterated(additive, ids, prompt, skip_prompt=True) == text[len(said) :]


def test_the_printing_streamer_prints_it(tokenizer, additive, capsys):
    for text in TEXTS:
        streamer = TextStreamer(additive)
        for token in tokenizer(text)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert capsys.readouterr().out == f" {text}\n"


def test_text_comes_while_it_is_generated(tokenizer, additive):
    """Whole words are given out as soon as the next one begins."""
    streamer = TextIteratorStreamer(additive)
    for token in tokenizer("one two three four")["input_ids"]:
        streamer.put(torch.tensor([token]))
    assert "".join(streamer.text_queue.queue).startswith(" one two ")
