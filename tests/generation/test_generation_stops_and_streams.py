"""Where generation stops and how it is handed out, on the demo, whose greedy words are known by heart."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import grok1
from grok1.conversion.convert import convert


DEMO = Path(grok1.__file__).parent / "demo"
PASSAGE = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))[0]
NEW = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "hf"
    convert(DEMO, out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(PASSAGE["opening"], return_tensors="pt")


def generated(model, inputs, **options: Any) -> list[int]:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def greedy(model, tokenizer, inputs) -> list[int]:
    """Decoded by the definition: no cache, the most likely token after everything before it."""
    tokens = inputs["input_ids"]
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    text = tokenizer.decode(tokens[0])
    assert (PASSAGE["opening"] + PASSAGE["continuation"]).startswith(text[: len(PASSAGE["opening"]) + 60])
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Stopping
# --------------------------------------------------------------------------------------------------------------------
def texts(tokenizer, tokens: list[int]) -> list[str]:
    """What has been said after each token."""
    return [tokenizer.decode(tokens[: n + 1]) for n in range(len(tokens))]


@pytest.mark.parametrize("count", [1, 2])
def test_stop_strings_end_with_the_token_that_completes_one(model, tokenizer, inputs, greedy, count):
    """Strings that begin and end within tokens, from the middle of words."""
    said = texts(tokenizer, greedy)
    strings = [said[20][-5:-1], said[30][-4:]][:count]
    expected = next(n for n, text in enumerate(said) if any(string in text for string in strings)) + 1
    assert expected < NEW
    found = generated(model, inputs, stop_strings=strings, tokenizer=tokenizer)
    assert found == greedy[:expected]
    assert any(string in tokenizer.decode(found) for string in strings)


def test_stop_strings_need_the_tokenizer(model, inputs):
    with pytest.raises(ValueError, match="tokenizer"):
        generated(model, inputs, stop_strings=["the"])


def test_any_of_several_end_tokens_ends(model, inputs, greedy):
    ends = [greedy[12], greedy[9]]
    first = min(greedy.index(end) for end in ends)
    assert generated(model, inputs, eos_token_id=ends, pad_token_id=0) == greedy[: first + 1]


def test_a_criterion_of_the_users_own_ends_each_row_by_itself(model, inputs, greedy):
    """Row 0 after 5 tokens, row 1 after 9: what follows in row 0 is padding."""
    length = inputs["input_ids"].shape[1]

    class RowLengths(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= length + 5, input_ids.shape[1] >= length + 9])

    output = model.generate(
        **{key: value.repeat(2, 1) for key, value in inputs.items()},
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([RowLengths()]),
    )[:, length:].tolist()
    assert output == [greedy[:5] + [0] * 4, greedy[:9]]


def test_time_ends_it_after_one_token_at_the_earliest(model, inputs, greedy):
    assert generated(model, inputs, max_time=0.0) == greedy[:1]


def test_a_length_that_is_reached_already_is_refused(model, inputs):
    with pytest.raises(ValueError, match="max_length"):
        generated(model, inputs, max_new_tokens=None, max_length=2)


# --------------------------------------------------------------------------------------------------------------------
# Streaming
# --------------------------------------------------------------------------------------------------------------------
def test_text_streamer_prints_the_text(model, tokenizer, inputs, greedy, capsys):
    generated(model, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(greedy) + "\n"
    generated(model, inputs, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(inputs["input_ids"][0].tolist() + greedy) + "\n"


def test_text_iterator_streamer_hands_out_whole_words_before_the_end(model, tokenizer, inputs, greedy):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=generated, args=(model, inputs), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(greedy)
    assert len([piece for piece in pieces if piece]) > 10


def test_async_text_iterator_streamer_hands_out_the_same(model, tokenizer, inputs, greedy):
    async def collect() -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = Thread(target=generated, args=(model, inputs), kwargs={"streamer": streamer})
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        return pieces

    assert "".join(asyncio.run(collect())) == tokenizer.decode(greedy)


def test_streaming_beams_is_refused(model, tokenizer, inputs):
    with pytest.raises(ValueError, match=r"streamer.*beam"):
        generated(model, inputs, streamer=TextStreamer(tokenizer), num_beams=2)


# --------------------------------------------------------------------------------------------------------------------
# With the tokenizer
# --------------------------------------------------------------------------------------------------------------------
def test_token_healing_takes_the_likeliest_extension_of_the_last_token(model, tokenizer):
    """A prompt that ends within a word: its last token is replaced by the likeliest one that begins with it."""
    prompt = PASSAGE["opening"].rstrip()[:-1]
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    last = tokenizer.convert_ids_to_tokens(tokens[0, -1].item())
    longer = [i for piece, i in tokenizer.get_vocab().items() if piece.startswith(last)]
    assert len(longer) > 1
    with torch.no_grad():
        logits = model(tokens[:, :-1], use_cache=False).logits[0, -1]
    healed = torch.cat((tokens[0, :-1], torch.tensor([max(longer, key=lambda i: logits[i].item())])))
    expected = model.generate(
        healed[None],
        attention_mask=torch.ones_like(healed[None]),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        token_healing=True,
        tokenizer=tokenizer,
    )
    assert output[0].tolist() == expected[0].tolist()


def test_an_assistant_with_a_vocabulary_of_its_own(model, tokenizer, inputs, greedy, folder):
    """Its drafts travel as text from one tokenizer to the other."""
    assistant = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=3)
    assistant.resize_token_embeddings(1032, mean_resizing=False)
    calls = []
    assistant.register_forward_hook(lambda *_: calls.append(1))
    other = AutoTokenizer.from_pretrained(folder)
    found = generated(
        model, inputs, assistant_model=assistant, tokenizer=tokenizer, assistant_tokenizer=other, max_new_tokens=16
    )
    assert found == greedy[:16]
    assert calls
