"""`grok1 convert`: xAI's checkpoint to a folder for the hub."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import check_repository, check_size


# As in `grok1.conversion.names`, which imports torch's configuration classes.
DTYPES, LAYOUTS = ("bfloat16", "float32", "int8", "int4"), ("hub", "fused", "hpcai", "keyfan")
EXAMPLES = """
grok1 convert grok-1 grok-1-hf
grok1 convert grok-1 grok-1-int8 --dtype int8
grok1 convert grok-1 grok-1-gguf --layout gguf --dtype int8
grok1 convert grok-1 grok-1-hf --dry-run
grok1 convert hf://xai-org/grok-1 grok-1-hf --discard-source --push-to USER/grok-1-hf --discard-output
"""


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CKPT", help="Folder with tensor00000_000 ... (or the one above ckpt-0/), or hf://OWNER/NAME."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write: an empty folder, or none yet.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="[bfloat16|float32|int8|int4]",
            help="Of the matrices; int8 keeps xAI's own values and scales.",
            autocompletion=lambda: list(DTYPES),
        ),
    ] = "bfloat16",
    layout: Annotated[
        str,
        typer.Option(
            metavar="[hub|fused|hpcai|keyfan|gguf]",
            help="Names of the tensors; fused: the experts of a layer in one tensor; gguf: for llama.cpp.",
            autocompletion=lambda: list(LAYOUTS),
        ),
    ] = "hub",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="config.json; default: the one beside CKPT, or the release's.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="tokenizer.model; default: the one beside CKPT.")
    ] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Convert without a tokenizer.")] = False,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest shard, such as 5GB (the default; with gguf 50GB) or 4GiB.",
            callback=lambda value: None if value is None else check_size(value),
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="With int8 and int4: inputs per scale, 128 (the default), 64 or 32; gguf has 32."),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="With gguf: the embedding in float32 (the default with int8 and int4; the release: 3.2 GB), bfloat16 "
            "(1.6 GB) or q8_0 (0.9 GB, quantised)."
        ),
    ] = None,
    round_scales: Annotated[
        bool, typer.Option("--round-scales", help="With gguf: round scales that float16 does not hold.")
    ] = False,
    discard_source: Annotated[
        bool, typer.Option("--discard-source", help="With hf://: delete each fetched file when it is converted.")
    ] = False,
    scratch: Annotated[
        str, typer.Option(metavar="SIZE", help="With --discard-source: disk for fetched files.", callback=check_size)
    ] = "16GB",
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="USER/NAME",
            help="Upload each shard to this repository when it is finished.",
            callback=check_repository,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to: make the repository private.")] = False,
    discard_output: Annotated[
        bool, typer.Option("--discard-output", help="With --push-to: delete each shard here when it is uploaded.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print disk, memory and time; works without the files too.")
    ] = False,
    list_shards: Annotated[bool, typer.Option("--list-shards", help="With --dry-run: list every shard.")] = False,
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Worker threads; default: one per core.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert xAI's checkpoint to a folder that loads in Transformers. Run it again to resume."""
    from rich.console import Console

    from grok1.cli.progress import byte_progress, duration, starting

    with starting("torch and Transformers"):
        from grok1.conversion.convert import convert
        from grok1.conversion.dry_run import forecast
        from grok1.conversion.settings import Settings

    console = Console(markup=False, highlight=False, soft_wrap=True)
    settings = Settings(
        dtype=dtype,
        layout=layout,
        config=config,
        tokenizer=tokenizer,
        no_tokenizer=no_tokenizer,
        max_shard_size=max_shard_size,
        group_size=group_size,
        embedding=embedding,
        round_scales=round_scales,
        discard_source=discard_source,
        scratch=scratch,
        push_to=push_to,
        private=private,
        discard_output=discard_output,
    )
    if dry_run:
        from grok1.cli.forecast import show_forecast

        found = forecast(source, out, settings, jobs=jobs)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=2))
        else:
            show_forecast(found, console, list_shards)
        return

    begin = time.perf_counter()
    try:
        with byte_progress("Converting") as progress:
            plan = convert(source, out, settings, jobs=jobs, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished shards are kept in {out}: run the same command again to resume.") from None
    seconds = time.perf_counter() - begin
    if plan.is_finished and not as_json:
        console.print(f"{out}: converted already, {len(plan.shards)} shards in {plan.dtype}, {plan.nbytes:,} bytes")
        return
    if as_json:
        result = {"out": str(out), "shards": len(plan.shards), "bytes": plan.nbytes, "seconds": round(seconds, 1)}
        typer.echo(json.dumps(result, indent=2))
    else:
        console.print(f"{out}: {len(plan.shards)} shards in {plan.dtype}, {plan.nbytes:,} bytes, {duration(seconds)}")
        if discard_output:
            console.print(f'Next: grok1 generate {push_to} "The answer to life"')
        elif "://" in source:
            console.print(f"Next: grok1 verify {out}")
        else:
            console.print(f"Next: grok1 verify {out} --against {source}")
