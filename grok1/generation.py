"""Text from a converted folder, streamed to standard output."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grok1.errors import ConversionError
from grok1.loading import check_device_map, check_folder, load_model, load_tokenizer


@dataclass(frozen=True)
class Decoding:
    """How tokens are generated.

    Args:
        max_new_tokens: generate at most this many.
        temperature: 0 is greedy decoding.
        top_p: sample from the smallest set of tokens with this total probability; None: from all.
        top_k: sample from the k most likely tokens; None: from all.
        seed: of the sampling; None: a random one.
        compiled: compile the decoding step with torch.compile, with a static cache.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    compiled: bool = False

    def problems(self) -> list[str]:
        """Options that contradict each other, in the words of the command line."""
        return [
            f"--{name}: has no effect on greedy decoding; give a --temperature above 0"
            for name, value in (("top-p", self.top_p), ("top-k", self.top_k), ("seed", self.seed))
            if value is not None and self.temperature == 0
        ]

    def options(self) -> dict[str, Any]:
        """Arguments of `model.generate`. Sets the seed when sampling."""
        import torch
        from transformers import CompileConfig, set_seed

        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": self.top_k or 0}
            options["top_p"] = 1.0 if self.top_p is None else self.top_p
            set_seed(torch.seed() % 2**32 if self.seed is None else self.seed)
        if self.compiled:
            options |= {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
            options["compile_config"]._compile_all_devices = True  # Transformers compiles on GPUs only by default
        return options


@dataclass(frozen=True)
class Generated:
    """What `generate_text` did: the number of new tokens, and the seconds they took."""

    tokens: int
    seconds: float


def generate_text(
    folder: Path, prompt: str, decoding: Decoding, precision: str = "auto", **placement: Any
) -> Generated:
    """Print `prompt` and what follows it, token by token.

    Args:
        folder: a converted folder with a tokenizer.
        prompt: the text to continue.
        decoding: how.
        precision: as in `grok1.precision.loading_options`.
        placement: further arguments of `from_pretrained`: device_map, experts_on, expert_cache, attn_implementation.

    Raises:
        ConversionError: files are missing or cut off, options contradict each other, or the text exceeds the context.
    """
    if problems := decoding.problems():
        raise ConversionError("Cannot generate.", problems)
    config = check_folder(folder)
    check_device_map(placement.get("device_map"))

    from transformers import TextStreamer

    from modeling_grok1.pipeline_grok1 import continuation_tokenizer

    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    context = config.max_position_embeddings
    if length == 0:
        raise ConversionError("Cannot generate.", ["prompt: expected text, found none"])
    if length + decoding.max_new_tokens > context:
        new = decoding.max_new_tokens
        raise ConversionError(
            "Cannot generate.",
            [f"tokens: expected at most {context}, found {length} of the prompt and {new} to generate"],
            "Shorten the prompt or lower --max-new-tokens.",
        )
    model = load_model(folder, precision, **placement)
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(model.device),
        streamer=TextStreamer(continuation_tokenizer(tokenizer), skip_prompt=True, skip_special_tokens=True),
        **decoding.options(),
    )
    return Generated(output.shape[1] - length, time.perf_counter() - start)
