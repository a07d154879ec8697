"""The blocks of docs/ecosystem.md run as they are pasted, in the page's order, in a folder with `grok-1` (the demo, in
xAI's format) and `grok-1-hf` (converted from it). A block below `<!-- needs: ... -->` is left out. A block of Python
whose first line names a script is written to it."""

import re
import subprocess
from pathlib import Path

import grok1
from grok1.conversion.convert import convert


DEMO = Path(grok1.__file__).resolve().parent / "demo"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
BLOCK = re.compile(r"(?P<needs><!-- needs: [^\n]+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
SCRIPT = re.compile(r"# (\w+\.py)\n")


def test_the_recipes_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "grok-1").symlink_to(DEMO)
    convert(DEMO, tmp_path / "grok-1-hf")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "__docs__"}
    text = PAGE.read_text(encoding="utf-8")
    blocks = [block for block in BLOCK.finditer(text) if not block["needs"]]
    assert len(blocks) > 8
    for block in blocks:
        code = block["code"]
        if script := SCRIPT.match(code):
            Path(script[1]).write_text(code, encoding="utf-8")
        elif block["language"] == "python":
            # Compiled with the page's own line numbers, so that a traceback points there.
            lines_before = text[: block.start("code")].count("\n")
            exec(compile("\n" * lines_before + code, str(PAGE), "exec"), scope)
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
