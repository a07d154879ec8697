"""The converted tokenizer gives SentencePiece's ids and SentencePiece's text for any string, through AutoTokenizer.

SentencePiece reads the spelling of a special token as text: `split_special_tokens=True`."""

import json
import random
import textwrap
import typing
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from grok1.conversion.tokenizer import USER_DEFINED, convert_tokenizer, read_sentencepiece


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo" / "tokenizer.model"

SPECIALS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>"]
FRAGMENTS = [
    *SPECIALS,
    *("<0x0A>", "<0xAB>", "<0xFF>", "<0x00", "0xFF", "[PAD", "PAD]", "[[PAD]]", "[pad]"),
    *("<|separator|>", "<|mask|>", "<|control1|>", "<|control12|>", "<|control20|>", "<|control21|>", "<|mask|"),
    *(" ", "  ", "   ", " " * 7, " " * 16, " " * 17, " " * 40, "\t", "\t\t", "\t" * 9, "\n", "\n\n", "\n" * 10),
    *("\n" * 11, "\r", "\r\n", "\v", "\f", "\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u2028", "\u3000"),
    *("\u2581", "\u2581\u2581", " \u2581 ", "\ufeff", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000"),
    *("0", "007", "3.14159", "1e-5", "١٢٣", "१२", "²", "½", "Ⅷ"),
    *("the", " The", "Grok", "don't", "I'll", "naïve", "Straße", "İstanbul", "ﬁ", "antidisestablishmentarianism"),
    *("日本語", "テキスト", "한국어", "漢字かな交じり文", "統一", "𠀀", "𪛟", "ไทย", "မြန်မာ", "हिन्दी", "தமிழ்"),
    *("שלום", "مرحبا بالعالم", "\u202eabc\u202c", "\u200f", "\u200d", "\u200b", "Привет", "Ελληνικά", "ქართული"),
    *(
        "😀",
        "👩‍👩‍👧‍👦",
        "🇨🇭",
        "👍🏽",
        "❤️",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "☃",
        "♞",
        "\U0001d518\U0001d52b\U0001d526",
        "e\u0301",
        "é",
        "a\u0300\u0301\u0302\u0303",
        "\u0301",
    ),
    *(
        "if x:\n    return 0\n",
        "for (;;) {\n\t\tx++;\n}",
        "a[i]->b::c()",
        "/* */",
        "// x",
        "#!/bin/sh\n",
        "&lt;",
        "${x}",
    ),
    *("=" * 33, "-" * 80, "*" * 17, "#" * 7, "." * 5, "a" * 65, "ab" * 40, "ha" * 9, "aaab" * 8, "!" * 100, "🙂" * 12),
]


def hard_strings() -> list[str]:
    """6,500 strings: fragments alone and joined, code, random unicode from every plane, very long runs."""
    rng = random.Random(0)
    code = Path(textwrap.__file__).read_text() + Path(typing.__file__).read_text()
    planes = [
        (0x01, 0x250),
        (0x250, 0x2000),
        (0x2000, 0x3000),
        (0x3000, 0xD800),
        (0xE000, 0x10000),
        (0x10000, 0x110000),
    ]
    strings = ["", *FRAGMENTS, *(f"\n{fragment}\n" for fragment in FRAGMENTS)]
    strings += ["".join(rng.choices(FRAGMENTS, k=rng.randint(2, 9))) for _ in range(3500)]
    strings += [code[i : i + rng.randint(1, 300)] for i in rng.choices(range(len(code)), k=1200)]
    for low, high in planes:
        strings += ["".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 30))) for _ in range(250)]
    strings += [character * 20_000 for character in (" ", "\n", "a", "=", "日", "😀")]
    strings.append(code[:60_000])
    return strings


class Pair(typing.NamedTuple):
    reference: sentencepiece.SentencePieceProcessor
    tokenizer: typing.Any
    folder: Path


@pytest.fixture(scope="module", params=["demo", "release"])
def pair(request, tmp_path_factory) -> Pair:
    source = DEMO if request.param == "demo" else request.getfixturevalue("assets") / "tokenizer.model"
    folder = tmp_path_factory.mktemp(request.param)
    convert_tokenizer(source, folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source))
    return Pair(reference, AutoTokenizer.from_pretrained(folder, split_special_tokens=True), folder)


def differences(reference, tokenizer, strings: list[str]) -> list[tuple]:
    """(string, which, expected, found) for every string whose ids or whose decoded text differ."""
    found = []
    for text, ids in zip(strings, tokenizer(strings)["input_ids"] if strings else [], strict=True):
        expected = reference.encode(text)
        if ids != expected:
            found.append((text[:80], "ids", expected[:40], ids[:40]))
        if tokenizer.decode(ids) != reference.decode(expected):
            found.append((text[:80], "text", reference.decode(expected)[:80], tokenizer.decode(ids)[:80]))
    return found


def test_no_difference_over_hard_strings(pair):
    strings = hard_strings()
    assert len(strings) >= 5000
    assert differences(pair.reference, pair.tokenizer, strings) == []


def test_every_piece_alone_behind_a_newline_and_repeated(pair):
    """Behind a newline a piece is a segment of its own, without the dummy prefix: there `ignore_merges` acts."""
    step = max(1, pair.reference.get_piece_size() // 4000)
    pieces = [pair.reference.id_to_piece(i) for i in range(0, pair.reference.get_piece_size(), step)]
    texts = [piece.replace("\u2581", " ") for piece in pieces]
    strings = [*texts, *(f"\n{text}" for text in texts), *(f"\n{text * 5}" for text in texts)]
    assert differences(pair.reference, pair.tokenizer, strings) == []


def test_no_difference_over_random_unicode(pair):
    @settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
    def same(text: str) -> None:
        assert differences(pair.reference, pair.tokenizer, [text]) == []

    same()


def test_the_comparison_sees_a_wrong_pipeline(tmp_path):
    convert_tokenizer(DEMO, tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(DEMO))
    right = json.loads((tmp_path / "tokenizer.json").read_text())
    wrong = [right | {part: None} for part in ("pre_tokenizer", "normalizer", "decoder")]
    wrong.append(right | {"model": right["model"] | {"ignore_merges": False}})
    # Without the prefix, without its "▁", without the user-defined pieces, and without the cut that keeps the spelling
    # of a special token from being taken for the token.
    steps = right["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Metaspace", "Metaspace", "Split", "Split"]
    for i in range(len(steps)):
        wrong.append(right | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps[:i] + steps[i + 1 :]}})
    for data in wrong:
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        broken = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
        assert differences(reference, broken, [*FRAGMENTS, *(f"\n{text}\n" for text in FRAGMENTS)])


def test_special_tokens_in_text_are_text(pair):
    by_default = AutoTokenizer.from_pretrained(pair.folder)
    for text in ("[PAD]", "\n[PAD]\n", "[BOS][EOS]", "\n[UNK]\n[EOS]"):
        ids = pair.tokenizer(text)["input_ids"]
        assert ids == pair.reference.encode(text)
        assert by_default(text, split_special_tokens=True)["input_ids"] == ids  # for one call
        assert not {0, 1, 2, 3} & set(ids)
        assert pair.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_token_is_added_and_the_special_ids_are_xais(pair):
    tokenizer = pair.tokenizer
    assert tokenizer("Grok")["input_ids"] == tokenizer("Grok", add_special_tokens=False)["input_ids"]
    assert tokenizer("Grok")["input_ids"] == pair.reference.encode("Grok")
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[BOS]", "[EOS]", "[UNK]"}
    assert len(tokenizer) == pair.reference.get_piece_size()
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        pair.reference.id_to_piece(i) for i in range(len(tokenizer))
    ]


def test_batches_are_padded_on_the_left(pair):
    texts = ["Grok", "The answer to life, the universe, and everything"]
    batch = pair.tokenizer(texts, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    short, long = (pair.reference.encode(text) for text in texts)
    assert batch["input_ids"].tolist() == [[0] * (len(long) - len(short)) + short, long]
    assert batch["attention_mask"].tolist() == [[0] * (len(long) - len(short)) + [1] * len(short), [1] * len(long)]
    assert pair.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts


def test_saving_and_loading_again_changes_nothing(pair, tmp_path):
    pair.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert differences(pair.reference, again, hard_strings()[:2000]) == []
    assert (again.padding_side, again.split_special_tokens, len(again)) == ("left", True, len(pair.tokenizer))


def test_user_defined_pieces_are_never_merged_with_their_neighbours(pair):
    model = read_sentencepiece(pair.folder / "tokenizer.model")
    pieces = [piece for piece in model.texts(USER_DEFINED) if " " not in piece]
    assert len(pieces) == 50
    for piece in pieces:
        ids = pair.tokenizer(f"a{piece}b")["input_ids"]
        assert pair.tokenizer.convert_tokens_to_ids(piece) in ids
    assert pair.tokenizer.tokenize("\n" * 11) == ["\u2581", "\n" * 10, "\n"]
