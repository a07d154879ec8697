"""`grok1 card`: the README.md of a converted folder."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from grok1.cli.options import LocalFolder


EXAMPLES = """
grok1 card grok-1-hf
grok1 card grok-1-hf --json
"""


def card_command(
    folder: LocalFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that was written by hand.")] = False,
) -> None:
    """Write the model card (README.md) of a converted or fine-tuned folder from its files, and LICENSE if missing."""
    from grok1.conversion.facts import card_facts
    from grok1.errors import ConversionError
    from grok1.model_card.card import CARD_NAME, LICENSE_NAME, is_card, write_card, write_license

    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(card_facts(folder)), indent=2))
        return
    existing = folder / CARD_NAME
    if existing.exists() and not force and not is_card(existing):
        raise ConversionError(
            f"{existing} was not written by this command.", next_step="`grok1 card --force` replaces it."
        )
    facts = card_facts(folder)
    path = write_card(folder, facts)
    typer.echo(f"{path}: {facts.parameters:,} parameters in {facts.precision}, {len(facts.shards)} shard(s)")
    if write_license(folder):
        typer.echo(f"{folder / LICENSE_NAME}: Apache-2.0, as xAI's release")
    typer.echo(f"Next: grok1 push {folder} USER/NAME --dry-run")
