"""The command group: loads the chosen command, and turns what it raises into a message and an exit code."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from grok1.cli.commands import COMMANDS
from grok1.errors import printable


CHOSEN = "grok1.command"  # key of a context's meta
DONE, FOUND_WRONG, BAD_INPUT, BROKEN, INTERRUPTED = 0, 1, 2, 3, 130


def report(kind: str, error: BaseException, advice: str = "") -> None:
    """Print an error on stderr: red on a terminal, plain elsewhere, no line break within a path."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    message = printable(str(error).strip())
    console.print(f"{kind}: {message}" if message else f"{kind}.", style="red")
    if advice:
        console.print(advice)


def show_traceback() -> None:
    from rich.console import Console
    from rich.traceback import Traceback

    Console(stderr=True).print(Traceback(show_locals=False))


class CommandGroup(TyperGroup):
    """Imports a command when it is chosen, and turns what it raises into a message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        ctx.meta[CHOSEN] = cmd_name
        return COMMANDS[cmd_name].load() if cmd_name in COMMANDS else super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # A command that knows more than its entry in the table says so in the exception.
            command = COMMANDS.get(ctx.meta.get(CHOSEN, ""))
            report("Interrupted", error if str(error) or command is None else KeyboardInterrupt(command.interrupted))
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, TyperException, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                show_traceback()
            if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
                report("Error", error, "`grok1 plan` shows which precision fits on which GPUs.")
            elif isinstance(error, (ValueError, OSError, ImportError)):
                report("Error", error)
            else:
                advice = f"This is a bug. `grok1 --debug {ctx.invoked_subcommand} ...` prints the traceback."
                report(f"Internal error ({type(error).__name__})", error, advice)
                raise typer.Exit(BROKEN) from None
            raise typer.Exit(BAD_INPUT) from None
