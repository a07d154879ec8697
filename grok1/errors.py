"""The errors of the tools. All are ValueErrors: what, where, expected, found, next step."""

from __future__ import annotations

from collections.abc import Sequence


class ConversionError(ValueError):
    """A refusal of a tool, in one message that lists every problem found.

    Args:
        summary: one sentence: what was refused, and where.
        problems: one line a problem (file: expected ..., found ...).
        next_step: what the user can do about it.
    """

    def __init__(self, summary: str, problems: Sequence[str] = (), next_step: str = ""):
        self.summary, self.problems, self.next_step = summary, list(problems), next_step
        lines = [summary, *(f"  - {problem}" for problem in self.problems)]
        if next_step:
            lines.append(next_step)
        super().__init__("\n".join(lines))


class CheckpointError(ConversionError):
    """A file or folder that is not, or not wholly, a checkpoint in xAI's format."""
