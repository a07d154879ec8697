"""With `--continuations` decoding is additive: programs that decode only the completion get all of its spaces."""

import json
import random
from pathlib import Path

import pytest
from test_tokenizer_equals_sentencepiece import hard_strings
from transformers import AutoTokenizer
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.conversion.tokenizer import convert_tokenizer
from grok1.conversion.verify_sums import verify_sums
from grok1.files import update_sums
from modeling_grok1.pipeline_grok1 import continuation_tokenizer


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo" / "tokenizer.model"


@pytest.fixture(scope="module", params=["demo", "release"])
def source(request) -> Path:
    return DEMO if request.param == "demo" else request.getfixturevalue("assets") / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    convert_tokenizer(source, out)
    return AutoTokenizer.from_pretrained(out)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("additive")
    result = CliRunner().invoke(app, ["tokenizer", str(source), str(out), "--continuations"])
    assert result.exit_code == 0, result.output
    return AutoTokenizer.from_pretrained(out)


@pytest.fixture(scope="module", params=["written", "saved and loaded again", "made in memory"])
def additive(request, written, tokenizer, tmp_path_factory):
    if request.param == "saved and loaded again":
        out = tmp_path_factory.mktemp("again")
        written.save_pretrained(out)
        return AutoTokenizer.from_pretrained(out)
    return written if request.param == "written" else continuation_tokenizer(tokenizer)


def pieces_of_characters(tokens: list[str]) -> list[int]:
    """Where a cut may be inside a character: between two byte pieces."""
    is_byte = [len(token) == 6 and token.startswith("<0x") for token in tokens]
    return [i for i in range(1, len(tokens)) if is_byte[i - 1] and is_byte[i]]


def test_the_parts_are_the_whole(additive):
    rng, checked = random.Random(3), 0
    for text in (text for text in hard_strings() if len(text) < 400):
        ids = additive(text)["input_ids"]
        inside = set(pieces_of_characters(additive.convert_ids_to_tokens(ids)))
        cuts = [i for i in range(len(ids) + 1) if i not in inside]
        whole = additive.decode(ids)
        for i in rng.sample(cuts, min(3, len(cuts))):
            assert additive.decode(ids[:i]) + additive.decode(ids[i:]) == whole
            checked += 1
    assert checked > 5000


def test_the_whole_text_has_one_space_more_and_the_same_ids(additive, tokenizer):
    for text in hard_strings()[:3000]:
        ids = tokenizer(text)["input_ids"]
        assert additive(text)["input_ids"] == ids
        starts_with_special = bool(ids) and ids[0] in tokenizer.all_special_ids
        prefix = "" if starts_with_special or not ids else " "
        assert additive.decode(ids) == prefix + tokenizer.decode(ids)


def test_code_keeps_its_indentation(additive, tokenizer):
    prompt, body = "def f(x):\n", "    return x\n"
    ids = tokenizer(prompt + body)["input_ids"]
    new = ids[len(tokenizer(prompt)["input_ids"]) :]
    assert additive.decode(new) == body
    assert tokenizer.decode(new) == body[1:]  # what the decoder of whole texts makes of it


def test_nothing_else_is_different(tmp_path):
    for name, continuations in (("whole", False), ("additive", True)):
        convert_tokenizer(DEMO, tmp_path / name, continuations=continuations)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        whole, additive = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "additive"))
        if name == "tokenizer.json":
            whole, additive = json.loads(whole), json.loads(additive)
            assert whole["decoder"]["decoders"].pop() == {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        assert whole == additive
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]


def test_the_decoder_of_a_folder_is_changed_in_place(tmp_path):
    """What was added to the tokenizer since stays, and the change is undone by the same command."""
    folder = tmp_path / "folder"
    convert(DEMO.parent, folder, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra42"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    update_sums(folder, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    assert CliRunner().invoke(app, ["tokenizer", str(folder), "--continuations"]).exit_code == 0
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"tokenizer.json", "SHA256SUMS"}
    assert not verify_sums(folder).problems
    additive = AutoTokenizer.from_pretrained(folder)
    assert additive.decode(additive("a zebra42 b")["input_ids"]) == " a zebra42 b"
    assert "messages" in additive.chat_template

    assert CliRunner().invoke(app, ["tokenizer", str(folder)]).exit_code == 0
    assert json.loads((folder / "tokenizer.json").read_bytes()) == json.loads(before["tokenizer.json"])


def test_folders_and_files_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    for words, expected in (
        ([str(tmp_path)], "expected a tokenizer, found none"),
        ([str(tmp_path), str(tmp_path / "out")], "changed where it is"),
        ([str(DEMO)], "expected a folder to write to"),
    ):
        result = CliRunner().invoke(app, ["tokenizer", *words, "--continuations"])
        assert result.exit_code != 0
        assert expected in " ".join((result.output + str(result.exception)).split())


def test_a_tokenizer_is_copied_only_where_it_changes(additive, tokenizer):
    assert continuation_tokenizer(additive) is additive
    before = tokenizer.decode(tokenizer("a b")["input_ids"])
    assert continuation_tokenizer(tokenizer) is not tokenizer
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == before == "a b"
