"""`grok1 adopt`: weights from another repository of Grok-1 to a hub folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def adopt_command(
    folder: Annotated[Path, typer.Argument(help="A folder like hpcai-tech/grok-1 or keyfan/grok-1-hf.")],
    out: Annotated[Path, typer.Argument(help="Where to write: an empty folder, or none yet.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest shard, such as 5GB or 4GiB.")] = "5GB",
) -> None:
    """Rewrite weights that others published (hpcai-tech's, keyfan's) into the layout of the hub folder, streaming."""
    from grok1.cli.progress import byte_progress
    from grok1.conversion.adopt import adopt

    with byte_progress("Adopting") as progress:
        plan = adopt(folder, out, max_shard_size=max_shard_size, progress=progress)
    typer.echo(f"{out}: {len(plan.shards)} shards in {plan.dtype}, {plan.nbytes:,} bytes")
