"""Hooks of mkdocs: the reference pages, generated from the code, and links that leave docs/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[2]
LAYOUT = ROOT / ".cache" / "layout"
# What each page of the API shows, in order.
PAGES = {
    "model": (
        "The model",
        [
            "modeling_grok1.configuration_grok1.GrokConfig",
            "modeling_grok1.modeling_grok1.Grok1Model",
            "modeling_grok1.modeling_grok1.Grok1ForCausalLM",
            "modeling_grok1.heads_grok1",
            "modeling_grok1.cpu_grok1.fast_decoding",
            "modeling_grok1.pipeline_grok1",
        ],
    ),
    "precision": (
        "Precision and placement",
        [
            "modeling_grok1.quantization_grok1.Grok1Int8Config",
            "modeling_grok1.quantization_grok1.Grok1Int4Config",
            "modeling_grok1.loading_grok1.Grok1LoadingMixin",
            "grok1.precision",
            "grok1.loading",
        ],
    ),
    "conversion": (
        "Conversion",
        [
            "grok1.conversion.convert",
            "grok1.conversion.settings",
            "grok1.conversion.inspect",
            "grok1.conversion.verify_source",
            "grok1.conversion.verify_output",
            "grok1.conversion.verify_sums",
            "grok1.conversion.adopt",
            "grok1.conversion.export_xai",
            "grok1.conversion.tokenizer",
            "grok1.conversion.names",
        ],
    ),
    "tools": (
        "Tools",
        [
            "grok1.generation",
            "grok1.distributed",
            "grok1.training",
            "grok1.analysis.evaluate",
            "grok1.analysis.routing",
            "grok1.analysis.figures",
            "grok1.analysis.curves",
            "grok1.sizing.plan",
            "grok1.sizing.hardware",
            "grok1.downloads",
            "grok1.model_card.card",
            "grok1.model_card.hub",
            "grok1.errors",
        ],
    ),
}


def grok1(*words: str) -> str:
    """What the command prints, drawn for 79 columns of plain text."""
    environment = {**os.environ, "PYTHONPATH": str(LAYOUT), "COLUMNS": "79", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "grok1", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def command_page() -> str:
    sys.path.insert(0, str(LAYOUT))
    from grok1.cli.commands import COMMANDS

    parts = ["# Commands", "Generated from the help of each command.", "## grok1", f"```text\n{grok1('--help')}```"]
    for name in COMMANDS:
        parts += [f"## grok1 {name}", f"```text\n{grok1(name, '--help').strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    pages = {"commands": command_page()}
    for name, (title, objects) in PAGES.items():
        pages[name] = "\n\n".join([f"# {title}", *(f"::: {target}" for target in objects)]) + "\n"
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files outside of docs/ go to the repository."""
    from grok1 import REPOSITORY

    return re.sub(r"\]\(\.\./([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", markdown)
