"""`grok1 push`: check a converted folder, show what will be sent, send it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


EXAMPLES = """
grok1 push grok-1-hf USER/grok-1-hf --dry-run
grok1 push grok-1-hf USER/grok-1-hf --private
"""


def push_command(
    folder: Annotated[Path, typer.Argument(help="A converted folder.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the hub: USER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if missing.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Accept code that is not this package's, and run it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show; send nothing.")] = False,
) -> None:
    """Check a converted folder and upload it to the hub; after an interruption, the same command resumes."""
    from rich.console import Console
    from rich.table import Table

    from grok1.cli.progress import byte_progress
    from grok1.errors import problem_lines
    from grok1.model_card.hub import check_folder, push_folder, upload_plan

    console, messages = Console(), Console(stderr=True)
    with byte_progress("Checking every tensor") as progress:
        problems = check_folder(folder, progress, trust_remote_code=trust_remote_code)
    if problems:
        for line in problem_lines(problems):
            messages.print(line, markup=False, highlight=False, soft_wrap=True)
        messages.print(f"{folder}: {len(problems)} problem(s); nothing was sent.", style="red", soft_wrap=True)
        raise typer.Exit(1)

    plan = upload_plan(folder)
    table = Table("commit", "file", "bytes", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for upload in plan:
        table.add_row("weights" if upload.is_weight else "last", upload.path, f"{upload.nbytes:,}")
    console.print(table)
    console.print(
        f"{len(plan)} files, {sum(upload.nbytes for upload in plan):,} bytes, to {repo}"
        f"{f' ({revision})' if revision else ''}{', private' if private else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if dry_run:
        console.print("Dry run: the folder is complete; nothing was sent.", highlight=False, soft_wrap=True)
        return
    try:
        address = push_folder(folder, repo, private=private, revision=revision)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{repo} holds what was committed so far and no card yet; the same command resumes from there."
        ) from None
    console.print(address, highlight=False, soft_wrap=True)
