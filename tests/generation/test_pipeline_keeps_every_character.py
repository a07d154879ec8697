"""`pipeline("text-generation")` gives the text that decoding prompt and answer together gives, to the character."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TextGenerationPipeline,
    pipeline,
)

import grok1
from grok1.conversion.convert import convert
from grok1.conversion.tokenizer import convert_tokenizer


DEMO = Path(grok1.__file__).parent / "demo"
PASSAGES = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
PROMPTS = [passage["opening"] for passage in PASSAGES] + ["ROMEO:\n", "O ", "  two", "The end.[EOS]"]
NEW = 6
# The contents of all turns, joined: the demo knows the continuation.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "hf"
    convert(DEMO, out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def answers(model, tokenizer) -> dict[str, str]:
    """What greedy decoding adds to each prompt, cut out of the text of both."""
    found = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0]
        if output[-1] == tokenizer.eos_token_id:  # which the pipeline skips
            output = output[:-1]
        text = tokenizer.decode(output)
        assert text.startswith(prompt)
        found[prompt] = text.removeprefix(prompt)
    for passage in PASSAGES:
        assert passage["continuation"].startswith(found[passage["opening"]])
    assert sum(answer.startswith(" ") for answer in found.values()) >= 7
    return found


@pytest.fixture(
    scope="module", params=["a folder's name", "a loaded model", "linear experts", "an additive tokenizer"]
)
def generator(request, folder, model, tokenizer, tmp_path_factory):
    if request.param == "a folder's name":
        return pipeline("text-generation", str(folder))
    if request.param == "linear experts":
        return pipeline("text-generation", str(folder), model_kwargs={"experts_layout": "linear"})
    if request.param == "an additive tokenizer":
        out = tmp_path_factory.mktemp("additive")
        convert_tokenizer(DEMO / "tokenizer.model", out, continuations=True)
        return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(out))
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def texts(outputs: list) -> list[str]:
    return [
        output[0]["generated_text"] if isinstance(output, list) else output["generated_text"] for output in outputs
    ]


def test_one_prompt(generator, answers):
    for prompt, answer in answers.items():
        options = {"max_new_tokens": NEW, "do_sample": False}
        assert texts(generator(prompt, **options)) == [prompt + answer]
        assert texts(generator(prompt, return_full_text=False, **options)) == [answer]


@pytest.mark.parametrize("full", [True, False])
def test_batches(generator, answers, full):
    expected = [prompt + answer if full else answer for prompt, answer in answers.items()]
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": full}
    assert texts(generator(list(answers), batch_size=4, **options)) == expected
    (several,) = generator([PROMPTS[0]], num_beams=2, num_return_sequences=2, **options)
    for output in several:
        text = output["generated_text"].removeprefix(PROMPTS[0] if full else "")
        assert text.startswith(" ")


def test_chats(generator, answers):
    generator.tokenizer.chat_template = TEMPLATE
    options = {"max_new_tokens": NEW, "do_sample": False}
    for passage in PASSAGES[:3]:
        opening = passage["opening"]
        first, second = opening[: opening.index(" ")], opening[opening.index(" ") :]
        user, start = {"role": "user", "content": first}, {"role": "assistant", "content": second}
        asked = {"role": "user", "content": opening}
        (answered,) = texts(generator([asked], **options))
        assert answered == [asked, {"role": "assistant", "content": answers[opening]}]
        (continued,) = texts(generator([user, start], **options))
        assert continued == [user, {"role": "assistant", "content": second + answers[opening]}]
        assert texts(generator([asked], return_full_text=False, **options)) == [answers[opening]]


def test_without_a_prompt_it_is_a_whole_text(generator, model, tokenizer):
    (text,) = texts(generator("", max_new_tokens=NEW, do_sample=False))
    output = model.generate(max_new_tokens=NEW, do_sample=False)[0]
    assert text.removeprefix(" ") == tokenizer.decode(output, skip_special_tokens=True)


def test_added_tokens_are_decoded(model, folder):
    """Added after the pipeline was made, and after it was used."""
    generator = pipeline(
        "text-generation", model=copy.deepcopy(model), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    generator(PROMPTS[0], max_new_tokens=1)
    generator.tokenizer.add_tokens(["zebra42"])
    generator.model.resize_token_embeddings(len(generator.tokenizer), mean_resizing=False)
    (text,) = texts(generator(PROMPTS[0], max_new_tokens=1, sequence_bias=[[[len(generator.tokenizer) - 1], 1000.0]]))
    assert text == PROMPTS[0] + "zebra42"


def test_other_models_get_transformers_own_pipeline(tokenizer):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=8, n_layer=1, n_head=1))
    assert type(pipeline("text-generation", model=other, tokenizer=tokenizer)) is TextGenerationPipeline


def test_saving_writes_the_tokenizer_of_whole_texts(generator, tokenizer, tmp_path):
    generator.save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        again.backend_tokenizer.decoder.__getstate__() == generator.tokenizer.backend_tokenizer.decoder.__getstate__()
    )


SCRIPT = """
import json, sys
folder, prompt, first = sys.argv[1:]
options = {"max_new_tokens": 6, "do_sample": False}
if first == "model":
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    from transformers import pipeline
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
else:
    from transformers import pipeline
    generator = pipeline("text-generation", folder, trust_remote_code=True)
assert "modeling_grok1" not in sys.modules
print(json.dumps([generator(prompt, **options), generator(prompt, return_full_text=False, **options)]))
"""


@pytest.mark.parametrize("first", ["model", "pipeline"])
def test_remote_code_alone(folder, answers, first, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), PROMPTS[0], first],
        env={**environment, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    full, new = (output[0]["generated_text"] for output in json.loads(result.stdout.splitlines()[-1]))
    assert (full, new) == (PROMPTS[0] + answers[PROMPTS[0]], answers[PROMPTS[0]])
