"""The `grok1` command: a thin shell over the library, in the order in which one works.

Every command is a plain function in a module of its own and imports torch and transformers inside, so that help and
shell completion answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.traceback import Traceback
from typer.core import TyperGroup
from typer.exceptions import TyperException

from grok1.analysis.evaluate import eval_command
from grok1.cli.adopt import adopt_command
from grok1.cli.card import card_command
from grok1.cli.convert import convert_command
from grok1.cli.demo import demo_command
from grok1.cli.export_xai import export_xai_command
from grok1.cli.generate import generate_command
from grok1.cli.inspect import inspect_command
from grok1.cli.push import push_command
from grok1.cli.routing import routing_command
from grok1.cli.serve import serve_command
from grok1.cli.tokenizer import tokenizer_command
from grok1.cli.verify import verify_command
from grok1.sizing.plan import plan_command


DONE, FOUND_WRONG, BAD_INPUT, BROKEN, INTERRUPTED = 0, 1, 2, 3, 130

EPILOG = (
    "Exit codes: 0 done; 1 looked and found something wrong; 2 bad usage or input; 3 the command itself broke; "
    "130 interrupted."
)


def report(kind: str, error: BaseException, advice: str = "") -> None:
    """One paragraph on stderr: red on a terminal, plain elsewhere, never broken in the middle of a path."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    message = str(error).strip()
    console.print(f"{kind}: {message}" if message else f"{kind}.", style="red")
    if advice:
        console.print(advice)


class Tour(TyperGroup):
    """Turns what a command raises into a paragraph and an exit code; commands only raise."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # A command that leaves work to go on with says so in the exception.
            report("Interrupted", error, "" if str(error) else "No unfinished file has its final name.")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, TyperException, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                Console(stderr=True).print(Traceback(show_locals=False))
            if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
                report("Error", error, "`grok1 plan` tells what fits on which GPUs, in which precision.")
            elif isinstance(error, (ValueError, OSError, ImportError)):
                report("Error", error)
            else:
                advice = f"This is a bug. `grok1 --debug {ctx.invoked_subcommand} ...` shows where."
                report(f"Broken ({type(error).__name__})", error, advice)
                raise typer.Exit(BROKEN) from None
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    name="grok1",
    cls=Tour,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


def hide_progress_bars() -> None:
    """Those of the libraries, which would fill a log; our own appear on a terminal only."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # for libraries that are not imported yet
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(
            f"grok1 {version('modeling-grok1')} (transformers {version('transformers')}, torch {version('torch')})"
        )
        raise typer.Exit(DONE)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """
    Grok-1, xAI's 314B mixture of experts, in Hugging Face Transformers.

    See it run first: [bold]grok1 demo[/bold]. Then, from xAI's download to a repository of your own:
    [bold]convert[/bold], [bold]generate[/bold], [bold]card[/bold], [bold]push[/bold].
    """
    # On import it warns of an optional kernel that it does not need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        hide_progress_bars()


START, CHECKPOINT, RUN, SHARE = "Start here", "From xAI's checkpoint", "Run and look inside", "Share"

# In the order in which one works.
COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("demo", demo_command, START),
    ("convert", convert_command, CHECKPOINT),
    ("inspect", inspect_command, CHECKPOINT),
    ("verify", verify_command, CHECKPOINT),
    ("tokenizer", tokenizer_command, CHECKPOINT),
    ("adopt", adopt_command, CHECKPOINT),
    ("export-xai", export_xai_command, CHECKPOINT),
    ("plan", plan_command, RUN),
    ("generate", generate_command, RUN),
    ("serve", serve_command, RUN),
    ("eval", eval_command, RUN),
    ("routing", routing_command, RUN),
    ("card", card_command, SHARE),
    ("push", push_command, SHARE),
)
for name, command, panel in COMMANDS:
    app.command(name, rich_help_panel=panel)(command)


def main() -> None:
    """Entry point of the `grok1` script."""
    app(prog_name="grok1")
