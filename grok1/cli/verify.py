"""`grok1 verify`: the source against what xAI published, or a converted folder against its source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from grok1.errors import problem_lines


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
    from grok1.downloads import local_folder
    from grok1.gguf_files import is_gguf

    folder = folder if is_gguf(folder) else local_folder(folder, whole=True)
    if against is None:
        if config is not None or tokenizer is not None:
            raise typer.BadParameter("--config and --tokenizer go with --against.")
        if folder.suffix == ".gguf":
            _verify_sums(folder.parent, jobs, as_json)
        elif (folder / "config.json").is_file() and not _holds_tensor_files(folder):
            _verify_sums(folder, jobs, as_json)
        else:
            _verify_source(folder, jobs, state, as_json)
    else:
        if state is not None:
            raise typer.BadParameter("--state goes with the released files, not with --against.")
        _verify_output(folder, against, config, tokenizer, jobs, as_json)


def _holds_tensor_files(folder: Path) -> bool:
    return any(
        place.is_dir() and any(place.glob("tensor*_000")) for place in (folder, folder / "ckpt-0", folder / "ckpt")
    )


def _verify_sums(folder: Path, jobs: int | None, as_json: bool) -> None:
    from rich.console import Console

    from grok1.cli.progress import byte_progress
    from grok1.conversion.verify_sums import verify_sums

    with byte_progress("Checking SHA-256") as progress:
        found = verify_sums(folder, jobs=jobs, progress=progress)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(found), "folder": str(folder)}, indent=2))
        raise typer.Exit(1 if found.problems else 0)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for line in problem_lines(found.problems):
        console.print(line)
    hub = f", {found.from_hub} of them also with the hub's checksums" if found.from_hub else ""
    console.print(f"{folder}: {found.files} files compared with their sums, {found.nbytes:,} bytes{hub}")
    if found.problems:
        console.print(f"{len(found.problems)} problems: download or convert these files again.", style="red")
        raise typer.Exit(1)


def _verify_source(folder: Path, jobs: int | None, state: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from grok1.cli.progress import byte_progress
    from grok1.conversion.verify_source import verify_source

    with byte_progress("Checking SHA-256") as progress:
        found = verify_source(folder, jobs=jobs, state=state, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        raise typer.Exit(0 if found.is_whole else 1)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for line in problem_lines([*found.problems, *(f"{name}: missing" for name in found.missing)]):
        console.print(line)
    again = f" ({found.remembered} remembered from {found.state})" if found.remembered else ""
    console.print(f"{found.folder}: {found.right} files match the published sums, {found.nbytes:,} bytes{again}")
    if not found.is_whole:
        console.print(
            f"{len(found.problems)} do not match, {len(found.missing)} are missing: download these again.", style="red"
        )
        raise typer.Exit(1)


def _verify_output(
    folder: Path, against: Path, config: Path | None, tokenizer: Path | None, jobs: int | None, as_json: bool
) -> None:
    from rich.console import Console

    from grok1.cli.progress import byte_progress
    from grok1.conversion.verify_output import verify_output

    with byte_progress("Recomputing every tensor") as progress:
        problems = verify_output(folder, against, config=config, tokenizer=tokenizer, jobs=jobs, progress=progress)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "against": str(against), "problems": problems}, indent=2))
        raise typer.Exit(1 if problems else 0)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for line in problem_lines(problems):
        console.print(line)
    if problems:
        console.print(f"{folder}: {len(problems)} problems", style="red")
        raise typer.Exit(1)
    console.print(f"{folder}: every tensor is bit-identical to a conversion of {against}")
    console.print(f"Next: grok1 push {folder} USER/NAME --dry-run")
