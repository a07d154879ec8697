"""`grok1 push`: check a converted folder, show what will be sent, send it."""

from __future__ import annotations

from typing import Annotated

import typer

from grok1.cli.options import LocalFolder, check_repository


EXAMPLES = """
grok1 push grok-1-hf USER/grok-1-hf --dry-run
grok1 push grok-1-hf USER/grok-1-hf --private
"""


def push_command(
    folder: LocalFolder,
    repo: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Repository on the hub.", callback=check_repository)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to push to; created if missing.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Accept code that is not this package's, and run it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show; send nothing.")] = False,
) -> None:
    """Check a converted folder and upload it to the hub; after an interruption, the same command resumes."""
    from rich.console import Console
    from rich.table import Table

    from grok1.cli.progress import byte_progress, starting
    from grok1.errors import problem_lines

    with starting("the checks"):
        from grok1.model_card.hub import check_folder, left_here, push_folder, upload_plan

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
    for name in left_here(folder):
        console.print(f"Not sent: {name}, which the Trainer wrote for itself", highlight=False, soft_wrap=True)
    if not (folder / "tokenizer.json").is_file():
        console.print(
            "No tokenizer in the folder. Give the Trainer processing_class=tokenizer, or write one now: "
            f"grok1 tokenizer TOKENIZER.MODEL {folder}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{len(plan)} files, {sum(upload.nbytes for upload in plan):,} bytes, to {repo}"
        f"{f' ({revision})' if revision else ''}{', private' if private else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if dry_run:
        console.print("Dry run: nothing was sent.", highlight=False, soft_wrap=True)
        console.print(f"Next: grok1 push {folder} {repo}", highlight=False, soft_wrap=True)
        return
    try:
        address = push_folder(folder, repo, private=private, revision=revision)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{repo} holds what was committed so far and no card yet: run the same command again to resume."
        ) from None
    console.print(address, highlight=False, soft_wrap=True)
    console.print(f'Next: grok1 generate {repo} "The answer to life"', highlight=False, soft_wrap=True)
