"""Every code block of README.md and docs/ runs as it is pasted, page by page, in the page's order, in an empty folder.

A block below `<!-- needs: ... -->` needs what a test lacks (the release, GPUs, other programs): it runs with stand-ins
(tests/support/stand_ins.py, a hub on loopback), or is only parsed if there is none. Blocks that need the libraries of
`make ecosystem` run there. Lines of bash that begin with `grok1` run in this process.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import stand_ins
from fake_hub import FakeHub
from typer.testing import CliRunner

from grok1 import REPOSITORY
from grok1.cli import app
from grok1.conversion.facts import card_facts
from grok1.conversion.names import BLOCK_KINDS, checkpoint_entries, hub_tensors
from grok1.conversion.release import ReleaseFile, release_sizes
from grok1.files import sha256_of


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "grok1" / "demo"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its blocks need libraries of an environment of their own: `make ecosystem` runs them (tests/ecosystem).
RUN_HERE = [page for page in PAGES if page.name != "ecosystem.md"]
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


# Run by another test, with servers and clients of their own: tests/serving/test_serve_docs_run.py, tests/engines.
ELSEWHERE = re.compile(
    r"^(grok1 serve|transformers chat|python -m vllm|mlx\.|mlx_lm\.(convert|server)|cmake|llama-)", re.M
)
NO_STAND_IN = re.compile(
    r"^\s*(from|import) (vllm|mlx|mlx_lm|openai|nnsight|deepspeed|lm_eval|trl|llmcompressor)\b", re.M
)
MISSING_PROGRAM = re.compile(r"^(python (benchmarks|llama\.cpp|convert_hf)|deepspeed|accelerate launch|docker)", re.M)


def is_run_here(block: Block) -> bool:
    """Whether this test runs a block: all but those that need a program or a server without a stand-in."""
    if block.language not in ("python", "bash"):
        return False
    if block.needs is None:
        return True
    if "make ecosystem" in block.needs:
        return bool(os.environ.get("GROK1_ECOSYSTEM"))
    return not any(pattern.search(block.code) for pattern in (ELSEWHERE, NO_STAND_IN, MISSING_PROGRAM))


def run_bash(code: str) -> None:
    """The commands in order: `grok1` in this process, what is between them in one shell."""
    shell: list[str] = []
    for line in [*commands(code), "grok1"]:
        if not line.startswith("grok1"):
            shell.append(line)
            continue
        if shell:
            script = "\n".join(shell)
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=300
            )
            assert result.returncode == 0, f"{script}\n{result.stdout}{result.stderr}"
            shell = []
        if line != "grok1":
            run_grok1(line)


def run_grok1(line: str) -> None:
    words = ["cpu" if word.startswith("cuda") else word for word in shlex.split(line, comments=True)[1:]]
    shown = CliRunner().invoke(app, words)
    if shown.exception is not None and not isinstance(shown.exception, SystemExit):
        raise shown.exception
    assert shown.exit_code == 0, f"{line}\n{shown.output}"


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A hub on loopback with the demo's checkpoint as xai-org/grok-1."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        for path in (DEMO / "config.json", *(DEMO / "ckpt-0").iterdir()):
            hub.add_file("xai-org/grok-1", str(path.relative_to(DEMO)), path.read_bytes())
        yield hub


@pytest.fixture
def published(monkeypatch):
    """The demo's checkpoint as the release, whose 770 sizes and checksums `grok1 verify` knows."""
    from grok1.conversion import verify_source
    from grok1.conversion.inputs import read_config

    files = tuple(
        ReleaseFile(entry, path.stat().st_size, sha256_of(path))
        for entry in checkpoint_entries(read_config(DEMO / "config.json"))
        for path in [DEMO / "ckpt-0" / entry.file]
    )
    monkeypatch.setattr(verify_source, "release_files", lambda: files)


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order_in_an_empty_folder(page, tmp_path, monkeypatch, hub, published):
    found = blocks(page)
    for block in found:
        known = ("python", "bash", "text", "bibtex")
        assert block.language in known, f"{page.name}:{block.line}: {block.language or 'none'}"
    # The commands of the libraries, beside this Python.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    stand_ins.install(tmp_path / "bin", monkeypatch)
    stand_ins.place_on_cpu(monkeypatch)
    (tmp_path / "empty").mkdir()
    if page.name == "training.md":
        (tmp_path / "empty" / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path / "empty")
    scope: dict = {"__name__": "__docs__"}
    for block in filter(is_run_here, found):
        if block.language == "python":
            # Compiled with the page's own line numbers, so that a traceback points there.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), scope)
        else:
            run_bash(block.code)
    assert os.getcwd() == str(tmp_path / "empty"), "a page must not change into another folder"


def test_the_repository_has_one_address():
    """README.md names it where it is typed; everything else reads `grok1.REPOSITORY`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^REPOSITORY=(\S+)", text, re.M)) == {REPOSITORY}


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
