"""What `grok1 convert --dry-run` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grok1.cli.progress import duration


if TYPE_CHECKING:
    from rich.console import Console

    from grok1.conversion.dry_run import Forecast


def show_forecast(found: Forecast, console: Console, list_shards: bool = False) -> None:
    """Print what a conversion would write, and what it needs."""
    console.print(f"from       {found.source}")
    console.print(f"output     {len(found.shards)} shards, {found.nbytes:,} bytes")
    short = "" if found.free_bytes >= found.needed_bytes else f": {found.needed_bytes - found.free_bytes:,} too few"
    console.print(f"disk       {found.needed_bytes:,} bytes needed, {found.free_bytes:,} free{short}")
    console.print(f"memory     at most {found.peak_bytes / 2**20:,.0f} MiB, plus the page cache")
    if found.bytes_per_second is None or found.seconds is None:
        console.print("time       unknown: nothing can be written there")
    else:
        rate = found.bytes_per_second / 1e6
        console.print(f"time       about {duration(found.seconds)}, at {rate:,.0f} MB/s of output, measured here")
    for name, nbytes in found.shards.items() if list_shards else ():
        console.print(f"{name}  {nbytes:>16,} bytes")
