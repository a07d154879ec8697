"""Progress bars: on stderr, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


Report = Callable[[int, int], None]


@contextmanager
def byte_progress(description: str) -> Iterator[Report]:
    """Show a bar while the block runs. Yields a function of (bytes done, total bytes) that any thread may call."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _progress(description, TextColumn("{task.description}"), *columns) as report:
        yield report


@contextmanager
def count_progress(description: str) -> Iterator[Report]:
    """Show a bar while the block runs. Yields a function of (items done, total items) that any thread may call."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _progress(description, TextColumn("{task.description}"), *columns) as report:
        yield report


@contextmanager
def _progress(description: str, *columns: object) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:  # type: ignore[arg-type]
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Say on a terminal what is being loaded, and clear the line at the end."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"Loading {what}"):
        yield


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 12 min, 3 h 05 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
