"""The bundled checkpoint: xAI's format, a scaled Grok-1's numbers, its size, and the record of its training."""

import json
import math
from pathlib import Path

import pytest

import grok1
from grok1.conversion.names import checkpoint_entries
from grok1.conversion.tokenizer import BYTE, USER_DEFINED, read_sentencepiece
from grok1.conversion.xai.checkpoint import examine_folder, read_tensor_file
from modeling_grok1 import GrokConfig


ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(grok1.__file__).parent / "demo"


@pytest.fixture(scope="module")
def config() -> GrokConfig:
    return GrokConfig.from_pretrained(DEMO)


def test_the_bundle_is_small_and_complete():
    files = {path.relative_to(DEMO).as_posix(): path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    files = {name: size for name, size in files.items() if "__pycache__" not in name}
    assert sum(files.values()) <= 12_000_000
    companions = {"__init__.py", "passages.py", "config.json", "passages.json", "tokenizer.model", "training.json"}
    assert set(files) == companions | {f"ckpt-0/tensor{i:05d}_000" for i in range(2 + 12 * 4)}


def test_the_exact_reader_accepts_every_file(config):
    files, problems = examine_folder(DEMO / "ckpt-0", checkpoint_entries(config))
    assert problems == []
    assert len(files) == 50


def test_scale_blocks_are_several_where_the_release_has_eight(config):
    for entry in checkpoint_entries(config):
        tensor = read_tensor_file(DEMO / "ckpt-0" / entry.file)
        if entry.path.endswith("moe/linear_1/w"):
            assert tensor.scales.shape == (8, 2, 256), entry.path
        elif entry.path.endswith("multi_head_attention/linear/w"):
            assert tensor.scales.shape == (2, 256), entry.path


def test_it_is_a_scaled_grok1(config):
    preset = json.loads((ROOT / "configuration" / "demo.json").read_text())
    assert {key: getattr(config, key) for key in preset} == preset
    assert config.num_hidden_layers >= 4
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.embedding_multiplier_scale == math.sqrt(config.hidden_size)
    assert config.attn_output_multiplier == 1 / math.sqrt(config.head_dim)
    assert config.output_multiplier_scale == GrokConfig().output_multiplier_scale == 0.5773502691896257
    assert config.attn_logit_softcapping == 30.0
    assert set(preset) == set(json.loads((ROOT / "configuration" / "grok-1.json").read_text()))


def test_its_shapes_fit_every_engine(config):
    """Quantisation groups of 32, 64 and 128 lie within one of xAI's scale blocks, llama.cpp's blocks of 256 within one
    row, and vLLM's CPU attention takes heads of multiples of 32."""
    blocks = json.loads((DEMO / "training.json").read_text())["settings"]["scale_blocks"]
    rows = {config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim}
    for row in rows:
        assert row % 256 == 0
        assert row // blocks % 128 == 0
    assert config.head_dim % 32 == 0


def test_it_has_seven_million_parameters(config):
    matrices = sum(math.prod(read_tensor_file(path).weight.shape) for path in (DEMO / "ckpt-0").iterdir())
    assert matrices == 7_221_504
    assert json.loads((DEMO / "training.json").read_text())["parameters"] == matrices


def test_the_tokenizer_is_of_xais_kind():
    model = read_sentencepiece(DEMO / "tokenizer.model")
    assert len(model.pieces) == 1024
    assert len(model.texts(BYTE)) == 256
    assert len(model.texts(USER_DEFINED)) == 65
    assert [piece.text for piece in model.pieces[:4]] == ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]


def test_the_tokenizer_has_the_releases_user_defined_pieces(assets):
    release, demo = (read_sentencepiece(folder / "tokenizer.model") for folder in (assets, DEMO))
    assert demo.texts(USER_DEFINED) == release.texts(USER_DEFINED)
    assert [piece.text for piece in demo.pieces[:69]] == [piece.text for piece in release.pieces[:69]]


def test_the_record_of_the_training_holds_what_was_promised():
    record = json.loads((DEMO / "training.json").read_text())
    passages = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
    for result in record["after_conversion"].values():
        assert result["recited_words"] == [len(passage["continuation"].split()) for passage in passages]
        assert result["held_in_perplexity"] < 14
        assert result["least_used_expert"] > 0.03
    assert set(record["after_conversion"]) == {"float32", "bfloat16", "int8"}
    for passage in passages:
        assert 6 <= len(passage["opening"].split()) <= 12
        assert 35 <= len(passage["continuation"].split()) <= 60
    # A completion that begins with a space shows whether its text is put together right.
    assert sum(passage["continuation"].startswith(" ") for passage in passages) == 7
