"""`grok1 generate`: text from a converted folder, printed as it comes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer


def generate_command(
    folder: Annotated[Path, typer.Argument(help="A converted folder with a tokenizer.", exists=True, file_okay=False)],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share of mass.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or auto (as stored).")] = "auto",
    device_map: Annotated[str, typer.Option(help="Where the layers go: auto, cpu, cuda, ...")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the step of a token: minutes to begin with, then the fastest.")
    ] = False,
) -> None:
    """Continue a text, streaming to standard output. Greedy unless a temperature is given."""
    import sys

    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, TextStreamer, set_seed

    from grok1.errors import ConversionError
    from modeling_grok1.pipeline_grok1 import continuation_tokenizer

    problems = [
        f"--{name}: has no effect on greedy decoding; give a --temperature above 0"
        for name, value in (("top-p", top_p), ("top-k", top_k), ("seed", seed))
        if value is not None and temperature == 0
    ]
    if dtype not in ("auto", "bfloat16", "float32"):
        problems.append(f"--dtype: expected auto, bfloat16 or float32, found {dtype}")
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    problems += [f"{folder / name}: not there" for name in missing]
    if problems:
        step = "`grok1 convert CKPT OUT` makes a folder from xAI's checkpoint." if "config.json" in missing else ""
        if missing == ["tokenizer.json"]:
            step = f"`grok1 tokenizer TOKENIZER.MODEL {folder}` writes the tokenizer's files."
        raise ConversionError("Cannot generate.", problems, step)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ConversionError("Cannot generate.", ["prompt: expected text, found none"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map).eval()
    context = model.config.max_position_embeddings
    if length + max_new_tokens > context:
        raise ConversionError(
            "Cannot generate.",
            [f"tokens: expected at most {context}, found {length} of the prompt and {max_new_tokens} to generate"],
            "Shorten the prompt or lower --max-new-tokens.",
        )

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}
        sampling["top_p"] = 1.0 if top_p is None else top_p
        set_seed(torch.seed() % 2**32 if seed is None else seed)
    speed: dict[str, Any] = {}
    if compiled:
        speed = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}
        speed["compile_config"]._compile_all_devices = True  # a CPU too
    typer.echo(prompt, nl=False)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(continuation_tokenizer(tokenizer), skip_prompt=True, skip_special_tokens=True),
        **sampling,
        **speed,
    )
    seconds = time.perf_counter() - start
    messages = Console(stderr=True)
    if messages.is_terminal:
        generated = output.shape[1] - length
        messages.print(f"{generated} tokens, {generated / seconds:.1f} tokens/s", style="dim", highlight=False)
