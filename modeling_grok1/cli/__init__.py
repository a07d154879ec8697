"""The `grok1` command: a thin shell over the library, in the order in which one works.

Every command is a plain function in a module of its own and imports torch and transformers inside, so that help and
shell completion answer at once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.traceback import Traceback
from typer.core import TyperGroup

from modeling_grok1.cli.card import card_command
from modeling_grok1.cli.push import push_command
from modeling_grok1.cli.routing import routing_command


DONE, FOUND_WRONG, BAD_INPUT, BROKEN, INTERRUPTED = 0, 1, 2, 3, 130

EPILOG = (
    "Exit codes: 0 done; 1 looked and found something wrong; 2 bad usage or input; 3 the command itself broke; "
    "130 interrupted."
)


def report(error: BaseException, kind: str, advice: str = "") -> None:
    """One paragraph on stderr: red on a terminal, plain elsewhere, never wrapped in the middle of a path."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    message = str(error).strip() or type(error).__name__
    console.print(f"{kind}: {message}", style="red")
    if advice:
        console.print(advice)


class Tour(TyperGroup):
    """Turns what a command raises into a message and an exit code; commands only raise."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            report(error, "Interrupted", "" if str(error) else "Nothing was left half-written under its final name.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            self.traceback(ctx)
            report(error, "Error")
            raise typer.Exit(BAD_INPUT) from None
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "exit_code"):
                raise
            self.traceback(ctx)
            report(
                error,
                f"Broken ({type(error).__name__})",
                f"`grok1 --debug {ctx.invoked_subcommand} ...` shows where.",
            )
            raise typer.Exit(BROKEN) from None

    @staticmethod
    def traceback(ctx: Any) -> None:
        if ctx.params.get("debug"):
            Console(stderr=True).print(Traceback(show_locals=False))


app = typer.Typer(
    name="grok1",
    cls=Tour,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


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


LOOK, CHECKPOINT, RUN, SHARE = "Start here", "From xAI's checkpoint", "Run and look inside", "Share"

for name, command, panel in (
    ("routing", routing_command, RUN),
    ("card", card_command, SHARE),
    ("push", push_command, SHARE),
):
    app.command(name, rich_help_panel=panel)(command)


def main() -> None:
    """Entry point of the `grok1` script."""
    app(prog_name="grok1")


if __name__ == "__main__":
    main()
