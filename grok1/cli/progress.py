"""Progress bars: on stderr, and only on a terminal."""

from __future__ import annotations

import threading
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
    """The bar is drawn from the first report to the one that all is done, so that it never shares the terminal with
    the bars of the libraries, which draw while weights are downloaded or loaded."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    lock = threading.Lock()
    bars: list[Progress] = []

    def report(done: int, total: int) -> None:
        if not console.is_terminal:
            return
        with lock:
            if not bars:
                bars.append(Progress(*columns, console=console))  # type: ignore[arg-type]
                bars[0].add_task(description, total=None)
                bars[0].start()
            bars[0].update(bars[0].task_ids[0], completed=done, total=total)
            if done >= total:
                bars.pop().stop()

    try:
        yield report
    finally:
        for bar in bars:
            bar.stop()


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
