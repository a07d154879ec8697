"""The commands in order, each imported when it is chosen."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import typer


# Rich's tables cut the names of options on narrower terminals.
WIDE_ENOUGH = 80
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


def markup() -> Literal["rich"] | None:
    """How help is drawn: rich tables, or plain text on a narrow terminal."""
    return "rich" if shutil.get_terminal_size().columns >= WIDE_ENOUGH else None


def examples(lines: str) -> str:
    """The end of a command's help: one example per line, as typed."""
    if markup() is None:
        return "\n\n".join(["Examples", *(f"$ {line}" for line in lines.strip().splitlines())])
    shown = [line.replace("[", r"\[") for line in lines.strip().splitlines()]
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[dim]$[/dim] {line}" for line in shown)])


@dataclass(frozen=True)
class Command:
    """A command: the function `NAME_command` of the module `grok1.cli.NAME` (`-` as `_`).

    Args:
        name: as typed.
        panel: the heading that it is listed under.
        interrupted: what is true after Ctrl-C at any time, printed after "Interrupted: ".
    """

    name: str
    panel: str
    interrupted: str

    def load(self) -> Any:
        """The command for typer. Imports its module; the `EXAMPLES` of the module end its help."""
        stem = self.name.replace("-", "_")
        module = import_module(f"grok1.cli.{stem}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=markup(), pretty_exceptions_enable=False)
        alone.command(self.name, rich_help_panel=self.panel, epilog=examples(module.EXAMPLES))(
            getattr(module, f"{stem}_command")
        )
        command = typer.main.get_command(alone)
        command.context_settings = CONTEXT_SETTINGS
        return command


RESUMES = "finished shards are kept in OUT: run the same command again to resume."
WHOLE = "every file under its final name is complete."
START, CHECKPOINT, RUN, SHARE = "Start here", "From xAI's checkpoint", "Run and look inside", "Share"

# In the order of a typical workflow.
COMMANDS = {
    command.name: command
    for command in (
        Command("demo", START, "run the same command again; with --out it resumes."),
        Command("convert", CHECKPOINT, RESUMES),
        Command("inspect", CHECKPOINT, "nothing was written."),
        Command("verify", CHECKPOINT, "no checked file was changed; the same command checks again."),
        Command("tokenizer", CHECKPOINT, WHOLE),
        Command("adopt", CHECKPOINT, RESUMES),
        Command("export-xai", CHECKPOINT, "finished files are kept in OUT: run the same command again to resume."),
        Command("plan", RUN, "nothing was written."),
        Command("generate", RUN, "no file was written."),
        Command("serve", RUN, "the server has stopped."),
        Command("eval", RUN, WHOLE),
        Command("routing", RUN, WHOLE),
        Command("curves", RUN, WHOLE),
        Command("card", SHARE, WHOLE),
        Command("push", SHARE, "what was committed to the repository stays: run the same command again to resume."),
    )
}
