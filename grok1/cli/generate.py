"""`grok1 generate`: text from a converted folder, streamed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from grok1.cli.options import AttnImplementation, ConvertedFolder, DeviceMap, ExpertCache, ExpertsOn, LoadingPrecision


EXAMPLES = """
grok1 generate grok-1-hf "The answer to life"
grok1 generate grok-1-hf "The answer to life" --temperature 0.8 --top-p 0.95 --seed 1
grok1 generate grok-1-hf "The answer to life" --precision int8 --experts-on disk --expert-cache 40GB
"""


def generate_command(
    folder: ConvertedFolder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Generate at most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="0 is greedy decoding.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", min=0.0, max=1.0, help="Nucleus sampling probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sample from the k most likely tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the sampling.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding step: minutes at first, then fastest.")
    ] = False,
    precision: LoadingPrecision = "auto",
    device_map: DeviceMap = "auto",
    experts_on: ExpertsOn = None,
    expert_cache: ExpertCache = None,
    attn_implementation: AttnImplementation = None,
) -> None:
    """Continue a text, streaming to standard output. Greedy unless a temperature is given."""
    from grok1.cli.progress import starting

    with starting("torch and Transformers"):
        import transformers  # noqa: F401

    from grok1.downloads import local_folder
    from grok1.generation import Decoding, generate_text

    placement = {"experts_on": experts_on, "expert_cache": expert_cache, "attn_implementation": attn_implementation}
    generated = generate_text(
        local_folder(folder),
        sys.stdin.read() if prompt == "-" else prompt,
        Decoding(max_new_tokens, temperature, top_p, top_k, seed, compiled),
        precision,
        device_map=device_map,
        **{name: value for name, value in placement.items() if value is not None},
    )
    if sys.stderr.isatty():
        typer.echo(f"{generated.tokens} tokens, {generated.tokens / generated.seconds:.1f} tokens/s", err=True)
