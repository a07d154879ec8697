"""Special and added tokens in a text are tokens, what is between them is read as SentencePiece reads it, and the space
in front belongs to the beginning of the text alone; as `LlamaTokenizer` reads, where it is right."""

import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer_equals_sentencepiece import FRAGMENTS, hard_strings
from transformers import AutoTokenizer, LlamaTokenizer

from grok1.conversion.tokenizer import convert_tokenizer


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo" / "tokenizer.model"
SPECIALS = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3}
CHATML = ["<|im_start|>", "<|im_end|>"]
WORD = "zebra42"


@pytest.fixture(scope="module", params=["demo", "release"])
def source(request) -> Path:
    return DEMO if request.param == "demo" else request.getfixturevalue("assets") / "tokenizer.model"


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    convert_tokenizer(source, out)
    return out


@pytest.fixture(scope="module")
def reference(source) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(source))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def extended(folder):
    """With the tokens that people add: ChatML's, and a plain word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": CHATML})
    tokenizer.add_tokens([WORD])
    return tokenizer


def by_definition(text: str, reference, tokens: dict[str, int]) -> list[int]:
    """`text` cut at `tokens`; SentencePiece's ids of what is between, with its dummy prefix at the beginning only."""
    ids: list[int] = []
    for i, part in enumerate(re.split("(" + "|".join(map(re.escape, tokens)) + ")", text)):
        if i % 2:
            ids.append(tokens[part])
        elif part:
            # Digits are pieces that merge with nothing: what is behind one has no prefix.
            ids += reference.encode(part) if i == 0 else reference.encode(f"0{part}")[2:]
    return ids


def differences(tokenizer, reference, tokens: dict[str, int], strings: list[str]) -> list[tuple]:
    found = []
    for text, ids in zip(strings, tokenizer(strings)["input_ids"], strict=True):
        expected = by_definition(text, reference, tokens)
        if ids != expected:
            found.append((text[:80], "ids", expected[:40], ids[:40]))
        # SentencePiece has no escape for its own sign of a space.
        if tokenizer.decode(ids) != text.replace("\u2581", " "):
            found.append((text[:80], "text", tokenizer.decode(ids)[:80]))
    return found


def strings_with(tokens: list[str], count: int) -> list[str]:
    rng = random.Random(1)
    between = [text for text in hard_strings() if len(text) < 400]
    mixed = ["".join(rng.choices([*FRAGMENTS, *tokens * 5], k=rng.randint(2, 9))) for _ in range(count)]
    around = [f"{rng.choice(between)}{rng.choice(tokens)}{rng.choice(between)}" for _ in range(count)]
    return [*tokens, *(token * 2 for token in tokens), *(f"({token})" for token in tokens), *mixed, *around]


def test_special_tokens_in_text_are_the_tokens(tokenizer, reference):
    assert tokenizer("The end.[EOS]")["input_ids"] == [*reference.encode("The end."), 2]
    assert tokenizer.decode(tokenizer("The end.[EOS]")["input_ids"], skip_special_tokens=True) == "The end."
    assert differences(tokenizer, reference, SPECIALS, [*hard_strings(), *strings_with(list(SPECIALS), 1500)]) == []


def test_added_tokens_are_found_wherever_they_are(extended, reference):
    tokens = SPECIALS | {token: extended.convert_tokens_to_ids(token) for token in (*CHATML, WORD)}
    assert len(set(tokens.values())) == 7 and min(tokens[token] for token in (*CHATML, WORD)) >= len(reference)
    for text in (f"({WORD})", f"{WORD}{WORD}", f"a{WORD}b", f" {WORD} ", f"\n{WORD}\n", f"{CHATML[0]}{WORD}"):
        assert extended(text)["input_ids"].count(tokens[WORD]) == text.count(WORD)
    assert differences(extended, reference, tokens, strings_with([*SPECIALS, *CHATML, WORD], 1500)) == []


def test_any_text_comes_back(extended, reference):
    tokens = SPECIALS | {token: extended.convert_tokens_to_ids(token) for token in (*CHATML, WORD)}
    plain = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)

    @settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(plain, st.sampled_from(list(tokens))), max_size=6))
    def same(parts: list[str]) -> None:
        assert differences(extended, reference, tokens, ["".join(parts)]) == []

    same()


def test_saving_and_loading_again_changes_nothing(extended, reference, tmp_path):
    extended.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    tokens = SPECIALS | {token: extended.convert_tokens_to_ids(token) for token in (*CHATML, WORD)}
    assert differences(again, reference, tokens, strings_with(list(tokens), 300)) == []
    assert again.split_special_tokens is False and len(again) == len(extended)
    literally = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert literally("[BOS]a[EOS]<|im_end|>")["input_ids"] == reference.encode("[BOS]a[EOS]<|im_end|>")


def test_it_cuts_as_llama_tokenizer_does(folder, extended):
    """The same vocabulary in `LlamaTokenizer`: the same pieces where it is right, that is without user-defined pieces
    and without a space in front."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "bos", "eos", "unk")}
    llama = LlamaTokenizer(model["vocab"], merges, **names)
    llama.add_special_tokens({"additional_special_tokens": CHATML})
    llama.add_tokens([WORD])
    rng = random.Random(2)
    words = ["the", "king", " and", " queen", "(", ")", ", ", "[EOS]", "[BOS]", *CHATML, WORD, f" {WORD}", "é", "日本"]
    texts = ["".join(rng.choices(words, k=rng.randint(1, 8))).lstrip(" ") for _ in range(500)]
    for text in texts:
        assert extended.tokenize(text) == llama.tokenize(text), text
        assert extended.decode(extended(text)["input_ids"]) == text
    split = [text.split(" ") for text in texts[:50]]
    for words in split:
        options = {"is_split_into_words": True, "add_special_tokens": False}
        assert extended(words, **options).tokens() == llama(words, **options).tokens()


def test_chat_templates_write_tokens(extended):
    extended.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + eos_token }}"
        "{% endfor %}"
    )
    ids = extended.apply_chat_template([{"role": "user", "content": "Hello"}], return_dict=True)["input_ids"]
    assert ids[0] == extended.convert_tokens_to_ids("<|im_start|>") and ids[-1] == extended.eos_token_id == 2
    assert extended.decode(ids) == "<|im_start|>user\nHello[EOS]"
