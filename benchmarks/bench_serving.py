"""Tokens per second of an OpenAI-compatible server at 32 concurrent requests, whose answers are checked.

    python benchmarks/bench_serving.py http://127.0.0.1:8000/v1 MODEL [--requests 32] [--tokens 64]

The prompts are the openings of the demonstration checkpoint's passages, cut to different lengths.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI


PASSAGES = json.loads((Path(__file__).resolve().parents[1] / "grok1" / "demo" / "passages.json").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key="none", max_retries=0, timeout=600)
    texts = [passage["opening"] + passage["continuation"] for passage in PASSAGES]
    words = [len(passage["opening"].split(" ")) for passage in PASSAGES]
    prompts = [" ".join(texts[i % 8].split(" ")[: words[i % 8] + 2 * (i // 8)]) for i in range(options.requests)]

    def complete(prompt: str) -> tuple[str, int]:
        answer = client.completions.create(
            model=options.model, prompt=prompt, max_tokens=options.tokens, temperature=0
        )
        return answer.choices[0].text, answer.usage.completion_tokens

    complete(prompts[0])  # what is compiled or allocated at the first request
    start = time.perf_counter()
    with ThreadPoolExecutor(options.requests) as pool:
        answers = list(pool.map(complete, prompts))
    seconds = time.perf_counter() - start
    right = sum(texts[i % 8].startswith(prompts[i] + text[:40]) for i, (text, _) in enumerate(answers))
    tokens = sum(count for _, count in answers)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s; {right} of {len(prompts)} recite")


if __name__ == "__main__":
    main()
