"""`grok1 tokenizer`: the tokenizer files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


EXAMPLES = """
grok1 tokenizer grok-1/tokenizer.model grok-1-hf
grok1 tokenizer grok-1-hf --continuations
"""


def tokenizer_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="TOKENIZER.MODEL",
            help="xAI's tokenizer.model; or a converted folder, to change its decoder.",
            exists=True,
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write to; created if missing.", file_okay=False)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Refuse a tokenizer with more pieces than this.")
    ] = None,
    continuations: Annotated[
        bool,
        typer.Option(
            "--continuations",
            help="Decode additively: a completion decoded alone keeps its leading space, and a whole text gets one.",
        ),
    ] = False,
) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the ids of SentencePiece, beside a copy of the model."""
    from grok1.conversion.tokenizer import change_decoder, convert_tokenizer

    if source.is_dir():
        if out is not None or vocab_size is not None:
            raise typer.BadParameter("a folder is changed where it is: give --continuations alone, or a file.")
        change_decoder(source, continuations=continuations)
        typer.echo(f"{source}: tokenizer.json, decoding {'continuations' if continuations else 'whole texts'}")
        return
    if out is None:
        raise typer.BadParameter("expected a folder to write to after the file.")
    convert_tokenizer(source, out, vocab_size, continuations=continuations)
    typer.echo(f"{out}: tokenizer.model, tokenizer.json, tokenizer_config.json")
