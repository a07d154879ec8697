"""The `grok1` command: a thin layer over the library.

Every command is a function in a module of its own, which is imported when the command is chosen. It imports torch and
Transformers inside the function, so that help and shell completion start without them.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from grok1.cli.commands import CONTEXT_SETTINGS
from grok1.cli.group import DONE, CommandGroup


EPILOG = (
    "Exit codes: 0 success; 1 a check failed; 2 wrong usage or input; 3 internal error, please report it; "
    "130 interrupted."
)


app = typer.Typer(
    name="grok1",
    cls=CommandGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
    epilog=EPILOG,
)


def hide_progress_bars() -> None:
    """Turn off the progress bars of the libraries, which would fill a log; ours appear on a terminal only."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # for libraries that are not imported yet
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        names = ("modeling-grok1", "transformers", "torch")
        grok1, transformers, torch = (version(name) for name in names)
        typer.echo(f"grok1 {grok1} (transformers {transformers}, torch {torch})")
        raise typer.Exit(DONE)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """
    Grok-1, xAI's 314B mixture-of-experts model, in Hugging Face Transformers.

    Start with [bold]grok1 demo[/bold]. From xAI's files to your own repository:
    [bold]convert[/bold], [bold]generate[/bold], [bold]card[/bold], [bold]push[/bold].
    """
    import logging

    # It warns on import about an optional kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        hide_progress_bars()


def main() -> None:
    """Entry point of the `grok1` script."""
    app(prog_name="grok1")
