"""The commands in order, each imported when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import typer


MARKUP: Literal["rich"] = "rich"
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"]}


def examples(lines: str) -> str:
    """The end of a command's help: one example per line, as typed."""
    shown = [line.replace("[", r"\[") for line in lines.strip().splitlines()]
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[dim]$[/dim] {line}" for line in shown)])


@dataclass(frozen=True)
class Command:
    """A command: the function `NAME_command` of the module `grok1.cli.NAME` (`-` as `_`).

    Args:
        name: as typed.
        panel: the heading that it is listed under.
    """

    name: str
    panel: str

    def load(self) -> Any:
        """The command for typer. Imports its module; the `EXAMPLES` of the module end its help."""
        stem = self.name.replace("-", "_")
        module = import_module(f"grok1.cli.{stem}")
        alone = typer.Typer(add_completion=False, rich_markup_mode=MARKUP, pretty_exceptions_enable=False)
        alone.command(self.name, rich_help_panel=self.panel, epilog=examples(module.EXAMPLES))(
            getattr(module, f"{stem}_command")
        )
        command = typer.main.get_command(alone)
        command.context_settings = CONTEXT_SETTINGS
        return command


START, CHECKPOINT, RUN, SHARE = "Start here", "From xAI's checkpoint", "Run and look inside", "Share"

# In the order of a typical workflow.
COMMANDS = {
    command.name: command
    for command in (
        Command("demo", START),
        Command("convert", CHECKPOINT),
        Command("inspect", CHECKPOINT),
        Command("verify", CHECKPOINT),
        Command("tokenizer", CHECKPOINT),
        Command("adopt", CHECKPOINT),
        Command("export-xai", CHECKPOINT),
        Command("plan", RUN),
        Command("generate", RUN),
        Command("serve", RUN),
        Command("eval", RUN),
        Command("routing", RUN),
        Command("card", SHARE),
        Command("push", SHARE),
    )
}
