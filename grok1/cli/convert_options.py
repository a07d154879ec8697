"""The options of `grok1 convert` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import check_repository, check_size


# As in `grok1.conversion.names`, which imports torch's configuration classes.
DTYPES, LAYOUTS = ("bfloat16", "float32", "int8", "int4"), ("hub", "fused", "hpcai", "keyfan", "gguf")
HUB, GGUF = "From and to the hub", "GGUF"

Source = Annotated[
    str,
    typer.Argument(
        metavar="CKPT", help="Folder with tensor00000_000 ... (or the one above ckpt-0/), or hf://OWNER/NAME."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Where to write: an empty folder, or none yet.")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(DTYPES)}]",
        help="Of the matrices; int8 keeps xAI's own values and scales.",
        autocompletion=lambda: list(DTYPES),
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        metavar=f"[{'|'.join(LAYOUTS)}]",
        help="Names of the tensors; fused: the experts of a layer in one tensor; gguf: for llama.cpp.",
        autocompletion=lambda: list(LAYOUTS),
    ),
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="config.json; default: the one beside CKPT, or the release's.")
]
Tokenizer = Annotated[Path | None, typer.Option(metavar="FILE", help="tokenizer.model; default: the one beside CKPT.")]
NoTokenizer = Annotated[bool, typer.Option("--no-tokenizer", help="Convert without a tokenizer.")]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Largest shard, such as 5GB (the default; with gguf 50GB) or 4GiB.",
        callback=lambda value: None if value is None else check_size(value),
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(metavar="N", help="With int8 and int4: inputs per scale, 128 (the default), 64 or 32; gguf has 32."),
]
Embedding = Annotated[
    str | None,
    typer.Option(
        metavar="[float32|bfloat16|q8_0]",
        help="The embedding: float32 (the default with int8 and int4; the release: 3.2 GB), bfloat16 (1.6 GB) or q8_0 "
        "(0.9 GB, quantised).",
        rich_help_panel=GGUF,
    ),
]
RoundScales = Annotated[
    bool,
    typer.Option("--round-scales", help="Round scales that float16 does not hold exactly.", rich_help_panel=GGUF),
]
DiscardSource = Annotated[
    bool,
    typer.Option("--discard-source", help="Delete each fetched file when it is converted.", rich_help_panel=HUB),
]
Scratch = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="With --discard-source: disk for fetched files.", callback=check_size, rich_help_panel=HUB
    ),
]
PushTo = Annotated[
    str | None,
    typer.Option(
        metavar="USER/NAME",
        help="Upload each shard to this repository when it is finished.",
        callback=check_repository,
        rich_help_panel=HUB,
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="With --push-to: make the repository private.", rich_help_panel=HUB)
]
DiscardOutput = Annotated[
    bool,
    typer.Option(
        "--discard-output", help="With --push-to: delete each shard here when it is uploaded.", rich_help_panel=HUB
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print disk, memory and time; works without the files too.")]
ListShards = Annotated[bool, typer.Option("--list-shards", help="With --dry-run: list every shard.")]
Jobs = Annotated[int | None, typer.Option(metavar="N", help="Worker threads; default: one per core.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
