"""`grok1 demo`: the whole way, from the bundled checkpoint in xAI's format to generated text."""

from __future__ import annotations

import json
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer


SHOWN = 3  # passages that are printed; all are checked


def demo_command(
    out: Annotated[Path | None, typer.Option(help="Keep the converted folder here.", file_okay=False)] = None,
) -> None:
    """Convert the bundled checkpoint, load it, and let it recite Shakespeare."""
    with as_file(files("grok1") / "demo") as checkpoint:
        if out is not None:
            recite(checkpoint, out)
            return
        with tempfile.TemporaryDirectory(prefix="grok1-demo-") as folder:
            recite(checkpoint, Path(folder) / "grok-1-demo")


def recite(checkpoint: Path, folder: Path) -> None:
    """Convert `checkpoint` to `folder` and print what the model says. Exits with 1 unless it is word for word."""
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    from transformers.utils import logging

    import modeling_grok1  # noqa: F401  (registers the classes)
    from grok1.analysis.routing import load_bars, routing_statistics
    from grok1.conversion.convert import convert

    torch.set_num_threads(1)  # matrices this small lose more by waking threads than they gain
    logging.disable_progress_bar()
    console = Console(highlight=False)
    start = time.perf_counter()
    convert(checkpoint, folder)
    console.print(
        f"[bold]grok1 convert[/bold] {len(list((checkpoint / 'ckpt-0').iterdir()))} files in xAI's format "
        f"-> {len(list(folder.iterdir()))} files for the hub, {time.perf_counter() - start:.1f} s",
        soft_wrap=True,
    )

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    config = model.config
    console.print(
        f"[bold]from_pretrained[/bold] {model.num_parameters():,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_experts_per_tok} of {config.num_experts} experts a token, "
        f"{str(model.dtype).removeprefix('torch.')}, {model.get_memory_footprint() / 1e6:.1f} MB, "
        f"{time.perf_counter() - start:.1f} s\n",
        soft_wrap=True,
    )

    passages = json.loads((checkpoint / "passages.json").read_text(encoding="utf-8"))
    openings = [passage["opening"] for passage in passages]
    wholes = [passage["opening"] + passage["continuation"] for passage in passages]
    lengths = [len(ids) for ids in tokenizer(wholes)["input_ids"]]
    steps = max(lengths) - min(len(ids) for ids in tokenizer(openings)["input_ids"])
    start = time.perf_counter()
    outputs = generator(openings, batch_size=len(openings), max_new_tokens=steps, do_sample=False)
    seconds = time.perf_counter() - start

    exact = 0
    for i, (passage, whole, output) in enumerate(zip(passages, wholes, outputs, strict=True)):
        said = output[0]["generated_text"][len(passage["opening"]) : len(whole)]
        verbatim = said == passage["continuation"]
        exact += verbatim
        if i < SHOWN or not verbatim:
            console.print(Text.assemble((passage["opening"], "bold"), (said, "green" if verbatim else "red")))
            verdict = f"{len(said.split())} words, word for word" if verbatim else "not word for word"
            console.print(f"    ({passage['source']}: {verdict})\n", style="dim", soft_wrap=True)
    console.print(
        f"{exact} of {len(passages)} passages word for word; {len(passages) * steps / seconds:.0f} tokens/s in a "
        f"batch of {len(passages)}\n",
        style="bold",
        soft_wrap=True,
    )

    ids = tokenizer(wholes[0], return_tensors="pt")["input_ids"]
    console.print(f"Which of the {config.num_experts} experts spoke {openings[0]!r}:", soft_wrap=True)
    console.print(load_bars(routing_statistics(model, ids)), markup=False, soft_wrap=True)
    if exact < len(passages):
        raise typer.Exit(1)
