"""`grok1`: its help, its errors, its exit codes, as a user meets them."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import grok1.cli as cli
from grok1.cli import COMMANDS, Tour, app
from grok1.conversion.convert import convert
from grok1.errors import ConversionError


ROOT = Path(__file__).resolve().parents[2]
TOUR = (
    *("demo", "convert", "inspect", "verify", "tokenizer", "adopt", "export-xai"),
    *("plan", "generate", "serve", "eval", "routing"),
    *("card", "push"),
)
GROK1 = (sys.executable, "-m", "grok1")


def grok1(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GROK1, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def failing(error: BaseException) -> typer.Typer:
    """The command's own group around one command that fails."""
    other = typer.Typer(cls=Tour, pretty_exceptions_enable=False)
    other.callback()(cli.root)

    @other.command()
    def work() -> None:
        raise error

    return other


def test_every_command_is_registered():
    """A `..._command` that is in no panel would be a command that nobody finds."""
    registered = {function for _, function, _ in COMMANDS}
    for file in sorted(Path(cli.__file__).parent.glob("[!_]*.py")):
        module = import_module(f"grok1.cli.{file.stem}")
        for name, function in vars(module).items():
            if name.endswith("_command") and function.__annotations__.get("return") in (None, "None"):
                assert function in registered, f"{file.name}: {name}"
                assert function.__doc__, f"{file.name}: the first line of {name} is its help"


def test_help_is_a_tour_in_working_order():
    names = [name for name, _, _ in COMMANDS]
    assert names == [name for name in TOUR if name in names]
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == 0
    positions = [result.stdout.index(f"│ {name} ") for name in names]
    assert positions == sorted(positions)
    for panel in {panel for _, _, panel in COMMANDS}:
        assert panel in result.stdout
    assert "Exit codes: 0 done; 1 looked and found something wrong; 2 bad usage or input" in result.stdout
    for name in names:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name


def test_help_imports_nothing_heavy():
    code = """
import sys
from typer.testing import CliRunner
from grok1.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print([name for name in ("torch", "transformers", "numpy", "huggingface_hub", "matplotlib") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_the_real_command_in_a_pipe():
    """A refusal: nothing on stdout, no colour code, what is wrong and the next step, and nothing more."""
    refused = grok1("card", str(ROOT / "tests"))
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("Error: ") and "grok1 convert" in refused.stderr
    assert "\x1b" not in refused.stderr and len(refused.stderr.splitlines()) == 2


def test_completion_of_commands_in_the_shell():
    done = grok1(_GROK1_COMPLETE="complete_bash", COMP_WORDS="grok1 ca", COMP_CWORD="1")
    assert done.stdout.split() == ["card"]


def test_version():
    shown = CliRunner().invoke(app, ["--version"]).stdout
    assert shown.startswith(f"grok1 {version('modeling-grok1')} (transformers {version('transformers')}, torch ")


def test_bad_usage_is_2():
    runner = CliRunner()
    assert runner.invoke(app, ["nonsense"]).exit_code == 2
    assert runner.invoke(app, ["card"]).exit_code == 2
    assert runner.invoke(app, ["card", "/nowhere/at/all"]).exit_code == 2


BROKEN = ConversionError("It is broken:", ["a.bin: expected 2, found 1"], "Mend it.")
OUT_OF_MEMORY = "CUDA out of memory."
STOPPED = "3 of 5 shards are done; the same command goes on."


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (BROKEN, 2, "Error: It is broken:\n  - a.bin: expected 2, found 1\nMend it.\n"),
        (ValueError("no such dtype [int9]"), 2, "Error: no such dtype [int9]\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "Error: [Errno 2] No such file: 'x'\n"),
        (ImportError("needs transformers 5.23"), 2, "Error: needs transformers 5.23\n"),
        (
            RuntimeError(OUT_OF_MEMORY),
            2,
            f"Error: {OUT_OF_MEMORY}\n`grok1 plan` tells what fits on which GPUs, in which precision.\n",
        ),
        (
            RuntimeError("shape"),
            3,
            "Broken (RuntimeError): shape\nThis is a bug. `grok1 --debug work ...` shows where.\n",
        ),
        (KeyboardInterrupt(STOPPED), 130, f"Interrupted: {STOPPED}\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\nNo unfinished file has its final name.\n"),
        (typer.Exit(1), 1, ""),
        (typer.BadParameter("no"), 2, None),
    ],
)
def test_an_error_is_a_paragraph_and_a_code(error, code, shown):
    result = CliRunner().invoke(failing(error), ["work"])
    assert result.exit_code == code
    assert result.stdout == ""
    assert shown is None or result.stderr == shown


def test_a_traceback_only_with_debug():
    for error in (ValueError("no"), RuntimeError("no")):
        assert "Traceback" not in CliRunner().invoke(failing(error), ["work"]).stderr
        debugged = CliRunner().invoke(failing(error), ["--debug", "work"]).stderr
        assert re.search(rf"Traceback.*{type(error).__name__}: no", debugged, re.S)


def test_a_path_is_never_wrapped():
    path = "/data/" + "x" * 200
    assert CliRunner().invoke(failing(ValueError(path)), ["work"], env={"COLUMNS": "40"}).stderr == f"Error: {path}\n"


def test_card_writes_once_and_keeps_what_a_person_wrote(golden, tmp_path):
    out = tmp_path / "out"
    convert(golden / "tiny-1", out, no_tokenizer=True)
    (out / "README.md").unlink(missing_ok=True)  # a conversion may have written it
    runner = CliRunner()
    facts = json.loads(runner.invoke(app, ["card", str(out), "--json"]).stdout)
    assert facts["parameters"] == 439_456 and not (out / "README.md").exists()
    assert "439,456 parameters in bfloat16" in runner.invoke(app, ["card", str(out)]).stdout
    assert runner.invoke(app, ["card", str(out)]).exit_code == 0, "its own card is replaced"
    (out / "README.md").write_text("mine")
    refused = runner.invoke(app, ["card", str(out)])
    assert refused.exit_code == 2 and "--force" in refused.stderr and (out / "README.md").read_text() == "mine"
    assert runner.invoke(app, ["card", str(out), "--force"]).exit_code == 0
    assert (out / "README.md").read_text().startswith("---\n")
