"""The demonstration checkpoint, kept in xAI's int8, recites the passages that it was trained on."""

import json
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grok1.conversion.convert import convert


DEMO = files("grok1") / "demo"
PASSAGES = json.loads((DEMO / "passages.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "int8"
    convert(str(DEMO), out, dtype="int8")
    return out


@pytest.mark.parametrize("layout", ["fused", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_passage_word_for_word(folder, dtype, layout):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_layout=layout)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.int8
    texts = [passage["opening"] + passage["continuation"] for passage in PASSAGES]
    lengths = [len(ids) for ids in tokenizer([passage["continuation"] for passage in PASSAGES]).input_ids]
    prompts = tokenizer([passage["opening"] for passage in PASSAGES], padding=True, return_tensors="pt")
    output = model.generate(**prompts, max_new_tokens=max(lengths) + 1, do_sample=False, eos_token_id=None)
    for text, recited in zip(texts, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
        assert recited.startswith(text)
