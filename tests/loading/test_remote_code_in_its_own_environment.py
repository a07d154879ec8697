"""A converted folder runs with trust_remote_code where only torch and transformers are installed."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from grok1.conversion.convert import convert


PROMPT = "Now is the winter of our"

SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("modeling_grok1") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig, pipeline

folder, again, prompt = sys.argv[1:]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt").input_ids

def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True, **options)

model = load(folder)
greedy = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
with torch.no_grad():
    result = {"logits": model(ids).logits.tolist()}
    result["linear"] = load(folder, experts_layout="linear")(ids).logits.tolist()
result["greedy"] = model.generate(ids, generation_config=greedy)[0, ids.shape[1]:].tolist()
small = ContinuousBatchingConfig(block_size=4, num_blocks=64, max_batch_tokens=32)
batch = model.generate_batch(
    [ids[0].tolist()] * 2, generation_config=greedy, continuous_batching_config=small, progress_bar=False
)
result["batch"] = [output.generated_tokens for output in batch.values()]
model.set_attn_implementation("eager")
text = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, max_new_tokens=12, do_sample=False)
result["pipeline"] = text[0]["generated_text"]
model.save_pretrained(again)
with torch.no_grad():
    result["saved"] = load(again)(ids).logits.tolist()
json.dump(result, open("result.json", "w"))
"""


@pytest.mark.slow
def test_logits_generation_pipeline_and_saving_without_the_package(tmp_path):
    folder = tmp_path / "hub"
    convert(ROOT / "grok1" / "demo", folder, dtype="float32")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, "torch", "transformers"], check=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    (tmp_path / "run").mkdir()
    subprocess.run(
        [python, "-c", SCRIPT, str(folder), str(tmp_path / "again"), PROMPT],
        check=True,
        cwd=tmp_path / "run",
        env={**clean, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    for key in ("logits", "linear", "saved"):
        torch.testing.assert_close(torch.tensor(result[key]), logits, atol=1e-5, rtol=0)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)[0]
    assert result["greedy"] == greedy[ids.shape[1] :].tolist()
    assert result["batch"] == [result["greedy"]] * 2
    # The pipeline decodes what is new by itself, and SentencePiece takes the blank before a text's first word away.
    assert result["pipeline"] == PROMPT + tokenizer.decode(greedy[ids.shape[1] :])
    assert {path.name for path in Path(tmp_path / "again").glob("*.py")} == {
        path.name for path in (ROOT / "modeling_grok1").glob("*_grok1.py")
    }
    assert sys.prefix != str(environment)
