"""A converted folder works with trust_remote_code where only torch and transformers (and what they need) exist.

The environment is a folder of links to exactly those distributions, seen by an interpreter without site-packages: no
modeling_grok1, no accelerate, no bitsandbytes, and an empty Hugging Face cache.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


SCRIPT = """
import importlib.util, json, sys
folder, saved, tokens, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
found = {name: importlib.util.find_spec(name) is not None for name in ("modeling_grok1", "accelerate", "bitsandbytes")}

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers import ContinuousBatchingConfig, GenerationConfig

options = {"trust_remote_code": True, "local_files_only": True}
greedy = {"max_new_tokens": 8, "do_sample": False}
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
linear = AutoModelForCausalLM.from_pretrained(folder, experts_layout="linear", **options)
base = AutoModel.from_pretrained(folder, **options)
vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, model.config.vocab_size))]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
with torch.no_grad():
    ids = torch.tensor([tokens])
    torch.save(
        {
            "logits": model(ids).logits,
            "linear": linear(ids).logits,
            "hidden": base(ids).last_hidden_state,
            "generate": model.generate(torch.tensor([prompt]), eos_token_id=None, **greedy)[0, len(prompt) :].tolist(),
        },
        saved + ".pt",
    )
batched = model.generate_batch(
    [prompt],
    generation_config=GenerationConfig(eos_token_id=-1, **greedy),
    continuous_batching_config=ContinuousBatchingConfig(block_size=4, num_blocks=16, max_batch_tokens=32),
    progress_bar=False,
)
text = generator(" ".join(f"w{i}" for i in prompt), return_full_text=False, eos_token_id=None, **greedy)
(linear if "first" in saved else model).save_pretrained(saved)
print(json.dumps({
    "found": found,
    "clean": not any(info.values()),
    "class": type(model).__module__ + "." + type(model).__name__,
    "config": type(AutoConfig.from_pretrained(folder, **options)).__module__,
    "layouts": [model.experts_layout, linear.experts_layout],
    "batched": [output.generated_tokens for output in batched.values()],
    "text": text[0]["generated_text"],
    "implementation": [model.config._attn_implementation, model.get_experts_implementation()[""]],
}))
"""


def distributions(*names: str) -> dict[str, set[str]]:
    """The distributions of that name and all that they require: what each has put into site-packages."""
    found: dict[str, set[str]] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        found[name] = {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}
        for line in installed.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    packages = tmp_path_factory.mktemp("site-packages")
    site = Path(str(distribution("transformers").locate_file("")))
    for entries in distributions("torch", "transformers").values():
        for entry in entries:
            if not (packages / entry).exists():
                (packages / entry).symlink_to(site / entry)
    home = tmp_path_factory.mktemp("home")
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(packages),
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def elsewhere(environment, converted, reference, tmp_path_factory):
    """What the script finds with the converted folder, and with the folder that it saved from there."""
    golden = reference("tiny-1", "fp32")
    out = tmp_path_factory.mktemp("out")
    results = []
    folder = converted("tiny-1", "float32")
    for name in ("first", "second"):
        arguments = [folder, out / name, json.dumps(golden.tokens[0].tolist()), json.dumps(golden.prompt[0].tolist())]
        process = subprocess.run(
            [sys.executable, "-S", "-c", SCRIPT, *map(str, arguments)],
            env=environment,
            cwd=environment["HOME"],
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        results.append((json.loads(process.stdout.splitlines()[-1]), torch.load(out / f"{name}.pt"), out / name))
        folder = out / name
    return results


@pytest.mark.parametrize("which", [0, 1], ids=["converted", "saved again"])
def test_it_is_the_folders_code_that_runs(elsewhere, which):
    report, _, _ = elsewhere[which]
    assert report["found"] == {"modeling_grok1": False, "accelerate": False, "bitsandbytes": False}
    assert report["class"].startswith("transformers_modules.")
    assert report["class"].endswith(".modeling_grok1.Grok1ForCausalLM")
    assert report["config"].endswith(".configuration_grok1")
    assert report["clean"]
    assert report["layouts"] == ["fused", "linear"]
    assert report["implementation"] == ["eager", "grok1"]


@pytest.mark.parametrize("which", [0, 1], ids=["converted", "saved again"])
def test_it_computes_the_same(elsewhere, converted, reference, which):
    report, found, _ = elsewhere[which]
    golden = reference("tiny-1", "fp32")
    model = AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"))
    with torch.no_grad():
        logits = model(golden.tokens[:1]).logits
        hidden = model.model(golden.tokens[:1]).last_hidden_state
    for name, expected in (("logits", logits), ("linear", logits), ("hidden", hidden)):
        assert (found[name] - expected).abs().max() <= 1e-5, name
    assert (found["logits"][0] - golden.logits[0]).abs().max() <= 1e-4
    greedy = golden.greedy[:8].tolist()
    assert found["generate"] == greedy
    assert report["batched"] == [greedy]
    assert report["text"].split() == [f"w{token}" for token in greedy]


def test_saving_keeps_the_code_and_the_weights(elsewhere, converted, read_tensors):
    original = converted("tiny-1", "float32")
    code = {file.name: file.read_text() for file in original.glob("*.py")}
    assert {"configuration_grok1.py", "modeling_grok1.py"} <= code.keys()
    del code["heads_grok1.py"]  # saved with the models that have those heads
    config = json.loads((original / "config.json").read_text())
    tensors = read_tensors(original)
    for _, _, saved in elsewhere:  # the first by the linear layout, the second by the fused one
        assert {file.name: file.read_text() for file in saved.glob("*.py")} == code
        assert json.loads((saved / "config.json").read_text()) == config
        written = read_tensors(saved)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_the_package_saves_the_same_code(converted, tmp_path):
    folder = converted("tiny-1", "float32")
    code = {file.name: file.read_text() for file in folder.glob("*.py")}
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "heads")
    assert {file.name: file.read_text() for file in (tmp_path / "heads").glob("*.py")} == code
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "model")
    del code["heads_grok1.py"]
    assert {file.name: file.read_text() for file in (tmp_path / "model").glob("*.py")} == code
