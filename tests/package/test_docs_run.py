"""Every code block of README.md and docs/ runs as it is pasted, or says what hardware it needs and is parsed.

A block below `<!-- needs: ... -->` is only parsed, unless it needs the libraries of `make ecosystem` and they are
here. All others of a page run in its order, in a folder with: `grok-1` (a checkpoint in xAI's format, the demo's),
`grok-1-hf` (converted from it, unless the page makes it itself), `text.txt` and the repository's `examples`. Lines of
bash that begin with `grok1` run in this process. A block of Python whose first line names a script is written to it.
docs/ecosystem.md runs where its libraries are: `make ecosystem`.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.conversion.facts import card_facts
from grok1.conversion.names import BLOCK_KINDS, hub_tensors
from grok1.conversion.release import release_sizes


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "grok1" / "demo"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"# (\w+\.py)\n")
FENCE = re.compile(r"(?P<needs><!-- needs: [^\n]+ -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    needs: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: m.start("code")].count("\n") + 1, m["language"], m["code"], m["needs"])
        for m in FENCE.finditer(text)
    ]


def commands(code: str) -> list[str]:
    """The commands of a block of bash, continuation lines joined, comments and blank lines left out."""
    joined = re.sub(r"\\\n\s*", " ", code).splitlines()
    return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "grok-1").mkdir()
    shutil.copytree(DEMO / "ckpt-0", folder / "grok-1" / "ckpt-0")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(DEMO / name, folder / "grok-1" / name)
    convert(folder / "grok-1", folder / "converted")
    (folder / "text.txt").write_text("Now is the winter of our discontent\nMade glorious summer.\n")
    return folder


def run_bash(line: str) -> None:
    if not line.startswith("grok1 "):
        # The commands of the libraries beside this Python.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"} | {"PATH": path}
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True, timeout=500, env=environment
        )
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        return
    shown = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    assert shown.exit_code == 0, f"{line}\n{shown.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page, world, tmp_path, monkeypatch):
    if page.name == "ecosystem.md" and not os.environ.get("GROK1_ECOSYSTEM"):
        pytest.skip("needs the libraries of the page: `make ecosystem`")
    found = blocks(page)
    for block in found:
        assert block.language in ("python", "bash", "text"), f"{page.name}:{block.line}: {block.language or 'none'}"
    with_libraries = bool(os.environ.get("GROK1_ECOSYSTEM"))
    runnable = [
        block
        for block in found
        if block.language in ("python", "bash")
        and (block.needs is None or (with_libraries and "make ecosystem" in block.needs))
    ]
    shutil.copytree(world / "grok-1", tmp_path / "grok-1")
    shutil.copy(world / "text.txt", tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    if not any(re.search(r"^grok1 (convert .*|demo --out )grok-1-hf\b", block.code, re.M) for block in runnable):
        shutil.copytree(world / "converted", tmp_path / "grok-1-hf")
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "__docs__"}
    for block in runnable:
        if script := SCRIPT.match(block.code):
            Path(script[1]).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            # Compiled with the page's own line numbers, so that a traceback points there.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), scope)
        else:
            for line in commands(block.code):
                run_bash(line)
    assert os.getcwd() == str(tmp_path), "a page must not change into another folder"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_need_hardware_parse_and_name_real_options(page):
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            ast.parse(block.code, where)
        elif block.language == "bash":
            checked = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
            assert checked.returncode == 0, f"{where}: {checked.stderr}"
            for line in commands(block.code):
                if line.startswith("grok1 "):
                    known_options(line, where)


def known_options(line: str, where: str) -> None:
    command, *arguments = shlex.split(line, comments=True)[1:]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, f"{where}: no command {command}"
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"{re.escape(argument.split('=')[0])}\b", shown.stdout), f"{where}: {argument}"


def test_the_hardware_table_is_computed(tmp_path):
    """docs/hardware.md, row by row, from the sizes of the release."""
    (tmp_path / "config.json").write_text(json.dumps(vars(release_sizes())))
    facts = card_facts(tmp_path, hub_tensors(release_sizes()), shards=[1])
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    for row in facts.memory:
        weights = f"{row.weights / 1e9:.1f} GB" if row.weights < 1e12 else f"{row.weights / 1e12:.1f} TB"
        cache = f"{row.cache / 1e9:.1f} GB"
        assert f"| {row.precision} | {weights} | {cache} | {row.devices} |" in text
    assert f"{facts.parameters:,} parameters {facts.active_parameters:,} work for one token" in text
    experts = facts.parameters * facts.expert_share / 100
    assert f"{(facts.parameters - experts) * 2 / 1e9:.1f} GB with the embedding" in text
    read = experts / 4
    assert f"{2 * read / 1e9:.1f} GB in bfloat16 and {read / 1e9:.1f} GB in int8" in text


def test_the_conversion_sizes_are_computed():
    """docs/weights.md, the bytes of each `--dtype`."""
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for dtype in ("bfloat16", "float32", "int8"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{dtype}` |"))
        written = sum(tensor.nbytes for tensor in hub_tensors(release_sizes(), "hub", dtype).values())
        assert row.endswith(f"| {written:,} |")


def test_the_name_tables_are_the_converters():
    """docs/weights.md against conversion/names.py: every kind, path and name."""
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for kind in BLOCK_KINDS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind.path}`"))
        for name in (kind.hub, kind.hpcai, kind.keyfan):
            assert f"`{name.replace('{e}', 'M')}`" in row, (kind.name, name)
        assert f"({', '.join(kind.shape)}{',' if len(kind.shape) == 1 else ''})" in row
        assert ("int8" in row) == kind.quantised


def test_the_messages_that_are_explained_exist():
    """docs/troubleshooting.md quotes this package: its words must be in the source."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    code = "".join(
        file.read_text(encoding="utf-8")
        for folder in ("modeling_grok1", "conversion")
        for file in sorted((ROOT / folder).rglob("*.py"))
    )
    for message in (
        "The PyTorch model of Grok-1 needs transformers",
        "two spellings of one value disagree",
        "cannot be a Grok-1: ",
        "expected an empty folder or none",
        "another conversion is writing there",
        "a Git LFS pointer, not the file itself",
    ):
        assert message in text and message in code, message
    assert re.findall(r"^### (\d+)\.", text, re.M) == [str(n) for n in range(1, 26)]
    assert text.count("**Why.**") == text.count("**Cure.**") == 25


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
