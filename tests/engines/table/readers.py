"""
What one engine makes of a folder, in that engine's own environment:

    python readers.py ENGINE FOLDER DTYPE QUESTIONS.json ANSWERS.npz

QUESTIONS.json has `openings`, strings; `texts`, lists of ids; `steps`. ANSWERS.npz gets `log_probs` of every token at
every position of the texts, one below the other (sum of lengths, V); `greedy`, the `steps` likeliest tokens after each
opening; and `prompts`, the ids of the openings by the engine's own tokenizer. An engine that cannot run the folder
ends with its own error.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


Answers = tuple[list[np.ndarray], list[list[int]], list[list[int]]]


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_transformers(folder: Path, dtype: str, questions: dict[str, Any], **options: Any) -> Answers:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    prompts = [tokenizer(opening)["input_ids"] for opening in questions["openings"]]
    with torch.no_grad():
        log_probs = [log_softmax(model(torch.tensor([text])).logits[0].float()) for text in questions["texts"]]
    choice = {"max_new_tokens": questions["steps"], "do_sample": False, "eos_token_id": None}
    greedy = [model.generate(torch.tensor([ids]), **choice)[0, len(ids) :].tolist() for ids in prompts]
    return log_probs, greedy, prompts


def transformers_with_the_package(folder: Path, dtype: str, questions: dict[str, Any]) -> Answers:
    import modeling_grok1  # noqa: F401 - registers the model

    return by_transformers(folder, dtype, questions)


def transformers_with_remote_code(folder: Path, dtype: str, questions: dict[str, Any]) -> Answers:
    sys.modules["modeling_grok1"] = sys.modules["grok1"] = None  # type: ignore[assignment]
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
    return by_transformers(folder, dtype, questions, trust_remote_code=True)


def mlx_lm(folder: Path, dtype: str, questions: dict[str, Any]) -> Answers:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model, load_tokenizer

    model, _ = load_model(folder, model_config={"dtype": dtype}, trust_remote_code=True)
    tokenizer = load_tokenizer(folder, {"trust_remote_code": True})
    prompts = [tokenizer.encode(opening) for opening in questions["openings"]]
    log_probs = [log_softmax(model(mx.array([text]))[0].astype(mx.float32)) for text in questions["texts"]]
    greedy = []
    for ids in prompts:
        cache, said, step = make_prompt_cache(model), [], ids
        for _ in range(questions["steps"]):
            said.append(mx.argmax(model(mx.array([step]), cache)[0, -1]).item())
            step = said[-1:]
        greedy.append(said)
    return log_probs, greedy, prompts


def llama_cpp(folder: Path, dtype: str, questions: dict[str, Any]) -> Answers:
    """Through its converter, which unpacks the weights, as GGUF in that dtype; keys and values in float32."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "interop"))
    import torch
    from environment import CONVERTER
    from runtime import Runtime

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.gguf")
        outtype = {"float32": "f32", "bfloat16": "bf16"}[dtype]
        command = [sys.executable, str(CONVERTER), str(folder), "--outfile", str(file), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"convert_hf_to_gguf.py: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        llama = Runtime(file, torch.float32)
        prompts = [llama.llama.tokenize(text.encode(), add_bos=True, special=False) for text in questions["openings"]]
        log_probs = [log_softmax(llama.logits(text)) for text in questions["texts"]]
        greedy = [llama.greedy(ids, questions["steps"]) for ids in prompts]
    return log_probs, greedy, prompts


def vllm(folder: Path, dtype: str, questions: dict[str, Any]) -> Answers:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(folder), dtype=dtype, enforce_eager=True, max_logprobs=-1, max_model_len=512, seed=0)
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(opening) for opening in questions["openings"]]
    V = llm.llm_engine.model_config.get_vocab_size()  # noqa: N806
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=V, logprobs=V, detokenize=False)
    log_probs = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in questions["texts"]], params, use_tqdm=False):
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        log_probs.append(np.array([[row[token].logprob for token in range(V)] for row in rows]))
    params = SamplingParams(max_tokens=questions["steps"], temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    greedy = [list(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.engine_core.shutdown()
    return log_probs, greedy, prompts


READERS: dict[str, Callable[[Path, str, dict[str, Any]], Answers]] = {
    reader.__name__: reader
    for reader in (transformers_with_the_package, transformers_with_remote_code, mlx_lm, llama_cpp, vllm)
}


if __name__ == "__main__":
    engine, folder, dtype, questions, out = sys.argv[1:]
    log_probs, greedy, prompts = READERS[engine](Path(folder), dtype, json.loads(Path(questions).read_text()))
    width = max(map(len, prompts))
    np.savez(
        out,
        log_probs=np.concatenate(log_probs),
        greedy=np.array(greedy),
        prompts=np.array([ids + [-1] * (width - len(ids)) for ids in prompts]),
    )
