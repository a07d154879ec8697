"""`grok1 convert`: xAI's checkpoint to a folder for the hub."""

from __future__ import annotations

import json
import time

import typer

from grok1.cli import convert_options as option


EXAMPLES = """
grok1 convert grok-1 grok-1-hf
grok1 convert grok-1 grok-1-int8 --dtype int8
grok1 convert grok-1 grok-1-gguf --layout gguf --dtype int8
grok1 convert grok-1 grok-1-hf --dry-run
grok1 convert hf://xai-org/grok-1 grok-1-hf --discard-source --push-to USER/grok-1-hf --discard-output
"""


def convert_command(
    source: option.Source,
    out: option.Out,
    dtype: option.Dtype = "bfloat16",
    layout: option.Layout = "hub",
    config: option.Config = None,
    tokenizer: option.Tokenizer = None,
    no_tokenizer: option.NoTokenizer = False,
    max_shard_size: option.MaxShardSize = None,
    group_size: option.GroupSize = None,
    embedding: option.Embedding = None,
    round_scales: option.RoundScales = False,
    discard_source: option.DiscardSource = False,
    scratch: option.Scratch = "16GB",
    push_to: option.PushTo = None,
    private: option.Private = False,
    discard_output: option.DiscardOutput = False,
    dry_run: option.DryRun = False,
    list_shards: option.ListShards = False,
    jobs: option.Jobs = None,
    as_json: option.AsJson = False,
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
