"""`grok1 tokenizer`: the tokenizer files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


EXAMPLES = """
grok1 tokenizer grok-1/tokenizer.model grok-1-hf
"""


def tokenizer_command(
    tokenizer_model: Annotated[
        Path, typer.Argument(metavar="TOKENIZER.MODEL", help="xAI's tokenizer.model.", exists=True, dir_okay=False)
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write to; created if missing.", file_okay=False)
    ],
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
    from grok1.conversion.tokenizer import convert_tokenizer

    convert_tokenizer(tokenizer_model, out, vocab_size, continuations=continuations)
    typer.echo(f"{out}: tokenizer.model, tokenizer.json, tokenizer_config.json")
