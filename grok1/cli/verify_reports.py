"""What `grok1 verify` prints. Each report ends the command with status 1 if something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer
from rich.console import Console

from grok1.cli.progress import byte_progress
from grok1.errors import problem_lines


def report_sums(folder: Path, jobs: int | None, as_json: bool) -> None:
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


def report_source(folder: Path, jobs: int | None, state: Path | None, as_json: bool) -> None:
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


def report_output(
    folder: Path, against: Path, config: Path | None, tokenizer: Path | None, jobs: int | None, as_json: bool
) -> None:
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
