"""The report of benchmarks/gpu.py, in Markdown and JSON, from the results that exist."""

import json
from pathlib import Path
from typing import Any


def winners(results: list[dict[str, Any]]) -> list[str]:
    """The tuned tiles as lines of `TILES` in modeling_grok1/triton_grok1.py."""
    return [result["line"] for result in results if "line" in result]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def row(result: dict[str, Any]) -> str:
    found = f"{number(result['value'])} {result['unit']}" if "value" in result else ""
    detail = str(result.get("detail", "")).replace("|", "\\|").replace("\n", " ")
    return f"| {result['name']} | {result['status']} | {found} | {detail} |"


def markdown(about: dict[str, Any], parts: dict[str, dict[str, Any]], results: list[dict[str, Any]]) -> str:
    lines = ["# Run on an accelerator", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    failed = [result for result in results if result["status"] == "FAILED"]
    lines += ["", f"{len(results)} results, {len(failed)} failed.", ""]
    lines += ["| part | state | seconds |", "| --- | --- | --: |"]
    lines += [f"| {name} | {part['state']} | {part['seconds']:.1f} |" for name, part in parts.items()]
    if failed:
        lines += ["", "## Failed", "", "| result | status | value | detail |", "| --- | --- | --: | --- |"]
        lines += [row(result) for result in failed]
    for name in parts:
        rows = [row(result) for result in results if result["part"] == name]
        if rows:
            lines += ["", f"## {name}", "", "| result | status | value | detail |", "| --- | --- | --: | --- |", *rows]
    if table := winners(results):
        lines += ["", "## Tiles", "", "In the form of `TILES` in modeling_grok1/triton_grok1.py:", ""]
        lines += ["```python", "TILES = {", *(f"    {line}" for line in table), "}", "```"]
    return "\n".join(lines) + "\n"


def write_report(
    out: Path, about: dict[str, Any], parts: dict[str, dict[str, Any]], results: list[dict[str, Any]]
) -> None:
    """report.md and report.json, each replaced whole."""
    whole = {"about": about, "parts": parts, "results": results}
    for name, text in (
        ("report.json", json.dumps(whole, indent=1) + "\n"),
        ("report.md", markdown(about, parts, results)),
    ):
        temporary = out / f".{name}"
        temporary.write_text(text)
        temporary.replace(out / name)
