"""`grok1 adopt`: weights of another Grok-1 repository to a hub folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import check_local, check_size


EXAMPLES = """
grok1 adopt hpcai-grok-1 grok-1-hf
"""


def adopt_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Files of hpcai-tech/grok-1 or keyfan/grok-1-hf.", callback=check_local),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write: an empty folder, or none yet.")],
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest shard, such as 5GB or 4GiB.", callback=check_size)
    ] = "5GB",
) -> None:
    """Convert the weights of hpcai-tech/grok-1 or keyfan/grok-1-hf to the hub layout, streaming."""
    from grok1.cli.progress import byte_progress
    from grok1.conversion.adopt import adopt

    with byte_progress("Adopting") as progress:
        plan = adopt(folder, out, max_shard_size=max_shard_size, progress=progress)
    already = "adopted already, " if plan.is_finished else ""
    typer.echo(f"{out}: {already}{len(plan.shards)} shards in {plan.dtype}, {plan.nbytes:,} bytes")
    typer.echo(f'Next: grok1 generate {out} "The answer to life"')
