"""The errors of the tools. All are ValueErrors: what, where, expected, found, next step."""

from __future__ import annotations

from collections.abc import Sequence


SHOWN = 20


class ConversionError(ValueError):
    """A refusal of a tool, in one message that lists every problem found.

    Args:
        summary: one sentence: what was refused, and where.
        problems: one line per problem (file: expected ..., found ...). The message shows the first 20.
        next_step: what the user can do about it.
    """

    def __init__(self, summary: str, problems: Sequence[str] = (), next_step: str = ""):
        self.summary, self.problems, self.next_step = summary, list(problems), next_step
        shown = (problem.strip().replace("\n", "\\n") for problem in self.problems[:SHOWN])
        lines = [summary, *(f"  - {problem}" for problem in shown)]
        if len(self.problems) > SHOWN:
            lines.append(f"  - and {len(self.problems) - SHOWN:,} more")
        if next_step:
            lines.append(next_step)
        super().__init__("\n".join(map(printable, lines)))


def printable(text: str) -> str:
    """Text with control characters except line breaks escaped: names may come from untrusted files."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(ConversionError):
    """A file or folder that is not, or not wholly, a checkpoint in xAI's format."""
