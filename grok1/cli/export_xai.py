"""`grok1 export-xai`: a converted folder back to xAI's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


EXAMPLES = """
grok1 export-xai grok-1-hf exported
grok1 export-xai grok-1-gguf/grok-1-q8_0.gguf exported
"""


def export_xai_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A converted folder, USER/NAME on the hub (downloaded), or a GGUF file."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write ckpt-0/: an empty folder, or none yet.")],
    scale_blocks: Annotated[
        int,
        typer.Option(metavar="N", help="Scale blocks per matrix (the release: 8). Int8 folders keep theirs.", min=1),
    ] = 8,
) -> None:
    """Write a converted folder in xAI's format: int8 and float32 byte for byte, the rest quantised again (lossy)."""
    from rich.console import Console
    from rich.table import Table

    from grok1.cli.progress import byte_progress
    from grok1.conversion.export_xai import export_xai
    from grok1.downloads import local_folder
    from grok1.gguf_files import is_gguf

    folder = folder if is_gguf(folder) else local_folder(folder)
    with byte_progress("Exporting") as progress:
        report = export_xai(folder, out, scale_blocks=scale_blocks, progress=progress)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    already = "exported already, " if report.is_finished else ""
    console.print(f"{report.folder}: {already}{report.files} files, {report.nbytes:,} bytes")
    if report.is_finished:
        return
    console.print(f"{report.exact} files hold exactly what was stored, as xAI would write it")
    if report.widened:
        names = ", ".join(report.widened)
        console.print(f"stored in bfloat16 and float32 again, without the bits that were lost then: {names}")
    if report.losses:
        console.print(
            f"{sum(loss.files for loss in report.losses.values())} files were quantised again, which is lossy:"
        )
        table = Table("kind", "files", "mean error", "largest error", "in steps", box=None, pad_edge=False)
        for kind, loss in report.losses.items():
            row = (f"{loss.mean:.3g}", f"{loss.largest:.3g}", f"{loss.largest_in_steps:.3f}")
            table.add_row(kind, str(loss.files), *row)
        console.print(table)
