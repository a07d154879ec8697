"""`grok1 demo`: convert the bundled checkpoint, load it and generate text."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from rich.console import Console

    from grok1.demo.passages import Generated

EXAMPLES = """
grok1 demo
grok1 demo --out grok-1-hf
grok1 demo --out grok-1-hf --checkpoint grok-1
"""
SHOWN = 3  # passages that are printed; all are checked


def demo_command(
    out: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Keep the converted folder here.", file_okay=False)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="Copy the bundled checkpoint, in xAI's format, to this new folder."),
    ] = None,
) -> None:
    """Convert the bundled checkpoint, load it, and generate passages of Shakespeare."""
    from grok1.cli.progress import starting

    with starting("torch and Transformers"):
        import transformers  # noqa: F401

        from grok1.demo.passages import bundled_checkpoint, copy_checkpoint

    with bundled_checkpoint() as bundled, tempfile.TemporaryDirectory(prefix="grok1-demo-") as scratch:
        if checkpoint is not None:
            copy_checkpoint(bundled, checkpoint)
        run_demo(bundled, Path(scratch) / "grok-1-demo" if out is None else out)
    if checkpoint is not None:
        typer.echo(f"\nIn xAI's format: {checkpoint}. Next: grok1 convert {checkpoint} OUT")
    if out is not None:
        typer.echo(f'\nKept in {out}. Next: grok1 generate {out} "Now is the winter of our"')


def run_demo(checkpoint: Path, folder: Path) -> None:
    """Convert `checkpoint` to `folder` and print what the model generates. Exits with 1 unless all of it is exact."""
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from grok1.analysis.routing import load_bars, routing_statistics
    from grok1.conversion.convert import convert
    from grok1.demo.passages import generate_passages, read_passages

    torch.set_num_threads(1)  # matrices this small gain nothing from threads
    logging.disable_progress_bar()
    console = Console(highlight=False)
    start = time.perf_counter()
    convert(checkpoint, folder)
    console.print(
        f"[bold]grok1 convert[/bold] {len(list((checkpoint / 'ckpt-0').iterdir()))} files in xAI's format "
        f"-> {len(list(folder.iterdir()))} files for the hub, {time.perf_counter() - start:.1f} s",
        soft_wrap=True,
    )
    model, tokenizer = load(folder, console)
    passages = read_passages(checkpoint)
    generated = generate_passages(model, tokenizer, passages)
    print_passages(generated, console)
    ids = tokenizer(passages[0].text, return_tensors="pt")["input_ids"]
    title = f"Expert load by layer, {model.config.num_experts} experts, for {passages[0].opening!r}"
    console.print(f"{title}:", soft_wrap=True)
    console.print(load_bars(routing_statistics(model, ids)), markup=False, soft_wrap=True)
    if generated.exact < len(passages):
        raise typer.Exit(1)


def load(folder: Path, console: Console) -> tuple[Any, Any]:
    """Load the model and its tokenizer, and print the model's sizes."""
    from grok1.loading import load_model, load_tokenizer

    start = time.perf_counter()
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    config = model.config
    console.print(
        f"[bold]from_pretrained[/bold] {model.num_parameters():,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_experts} experts ({config.num_experts_per_tok} active per token), "
        f"{str(model.dtype).removeprefix('torch.')}, {model.get_memory_footprint() / 1e6:.1f} MB, "
        f"{time.perf_counter() - start:.1f} s\n",
        soft_wrap=True,
    )
    return model, tokenizer


def print_passages(generated: Generated, console: Console) -> None:
    """The first passages and every one that is not exact, then the verdict."""
    from rich.text import Text

    for i, (passage, text) in enumerate(zip(generated.passages, generated.continuations, strict=True)):
        exact = text == passage.continuation
        if i < SHOWN or not exact:
            console.print(Text.assemble((passage.opening, "bold"), (text, "green" if exact else "red")))
            verdict = f"{len(text.split())} words, word for word" if exact else "not word for word"
            console.print(f"    ({passage.source}: {verdict})\n", style="dim", soft_wrap=True)
    count = len(generated.passages)
    console.print(
        f"{generated.exact} of {count} passages word for word; {generated.tokens_per_second:.0f} tokens/s in a "
        f"batch of {count}\n",
        style="bold",
        soft_wrap=True,
    )
