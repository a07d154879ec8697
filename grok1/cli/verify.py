"""`grok1 verify`: the source against what xAI published, or a converted folder against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


EXAMPLES = """
grok1 verify grok-1
grok1 verify grok-1-hf
grok1 verify grok-1-hf --against grok-1
grok1 verify grok-1-gguf/grok-1-q8_0.gguf --against grok-1
"""


def verify_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="xAI's checkpoint, a converted folder, USER/NAME on the hub, or a GGUF file."
        ),
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="The checkpoint that FOLDER was converted from.", exists=True)
    ] = None,
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Files at once; default: one per core.", min=1)] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to record checked files; default: a hidden file in FOLDER."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --against: the config that the conversion was given.", exists=True),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --against: the tokenizer that the conversion was given.", exists=True),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check xAI's released files, or a converted folder: by its SHA-256 sums, or against its source, bit by bit."""
    from grok1.cli.verify_reports import report_output, report_source, report_sums
    from grok1.downloads import local_folder
    from grok1.gguf_files import is_gguf

    folder = folder if is_gguf(folder) else local_folder(folder, whole=True)
    if against is None:
        if config is not None or tokenizer is not None:
            raise typer.BadParameter("--config and --tokenizer go with --against.")
        if folder.suffix == ".gguf":
            report_sums(folder.parent, jobs, as_json)
        elif (folder / "config.json").is_file() and not _holds_tensor_files(folder):
            report_sums(folder, jobs, as_json)
        else:
            report_source(folder, jobs, state, as_json)
    else:
        if state is not None:
            raise typer.BadParameter("--state goes with the released files, not with --against.")
        report_output(folder, against, config, tokenizer, jobs, as_json)


def _holds_tensor_files(folder: Path) -> bool:
    return any(
        place.is_dir() and any(place.glob("tensor*_000")) for place in (folder, folder / "ckpt-0", folder / "ckpt")
    )
