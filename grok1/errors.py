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
        lines = [summary, *problem_lines(self.problems)]
        if next_step:
            lines.append(next_step)
        super().__init__("\n".join(map(printable, lines)))


def problem_lines(problems: Sequence[str]) -> list[str]:
    """One line per problem, the first SHOWN of them and a count of the others, with control characters escaped."""
    lines = [f"  - {printable(problem.strip()).replace(chr(10), chr(92) + 'n')}" for problem in problems[:SHOWN]]
    return [*lines, f"  - and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else lines


def printable(text: str) -> str:
    """Text with control characters except line breaks escaped: names may come from untrusted files."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class CheckpointError(ConversionError):
    """A file or folder that is not, or not wholly, a checkpoint in xAI's format."""
