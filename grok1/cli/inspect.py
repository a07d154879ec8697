"""`grok1 inspect`: the contents of a folder with xAI's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import check_local
from grok1.errors import problem_lines


EXAMPLES = """
grok1 inspect grok-1
grok1 inspect grok-1 --json
grok1 inspect grok-1-gguf/grok-1-q8_0.gguf
"""


def inspect_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="Folder with tensor00000_000 ..., or the one above it; or a GGUF file.",
            callback=lambda value: value if value.suffix == ".gguf" and value.is_file() else check_local(value),
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show a complete or partial checkpoint: kinds, counts, shapes, missing and damaged files; or a GGUF file."""
    from rich.console import Console
    from rich.table import Table

    from grok1.conversion.inspect import inspect_checkpoint
    from grok1.gguf_files import is_gguf

    if is_gguf(source):
        _inspect_gguf(source, as_json)
        return
    found = inspect_checkpoint(source)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        raise typer.Exit(0 if found.is_whole else 1)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    table = Table("kind", "files", "bytes", "shape", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for kind in found.kinds:
        shapes = "; ".join(kind.shapes) or "-"
        table.add_row(kind.kind, f"{kind.readable} of {kind.expected}", f"{kind.nbytes:,}", shapes)
    console.print(table)
    what = "the released checkpoint" if found.is_release else "not the release"
    console.print(f"{found.folder}: {what}, {found.layers} layers")
    console.print(f"{found.readable} of {found.expected} files are sound, {found.nbytes:,} bytes")
    for line in problem_lines(found.problems):
        console.print(line)
    if found.missing:
        console.print(f"{len(found.missing)} files are missing: {_ranges(found.missing)}")
    if not found.is_whole:
        raise typer.Exit(1)


def _inspect_gguf(path: Path, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from grok1.conversion.inspect_gguf import inspect_gguf

    found = inspect_gguf(path)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        raise typer.Exit(1 if found.problems else 0)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for key, value in found.keys.items():
        console.print(f"{key}  {value}")
    table = Table("kind", "name", "tensors", "bytes", "type and shape", box=None, pad_edge=False)
    table.columns[2].justify = table.columns[3].justify = "right"
    for kind in found.kinds:
        shapes = "; ".join(kind.shapes) or "-"
        table.add_row(kind.kind, kind.name, f"{kind.present} of {kind.expected}", f"{kind.nbytes:,}", shapes)
    console.print(table)
    console.print(f"{len(found.files)} files, {found.nbytes:,} bytes, {found.pieces:,} pieces in the vocabulary")
    for line in found.problems:
        console.print(f"  - {line}")
    if found.problems:
        raise typer.Exit(1)


def _ranges(names: list[str]) -> str:
    """tensor00003_000 to tensor00009_000, tensor00012_000"""
    runs: list[list[str]] = []
    for name in names:
        if runs and int(name[6:11]) == int(runs[-1][-1][6:11]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
