"""`grok1`: its help, its errors, its exit codes, as a user meets them."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from grok1 import cli
from grok1.cli import app
from grok1.cli.commands import COMMANDS
from grok1.cli.group import CommandGroup
from grok1.conversion.convert import convert
from grok1.errors import ConversionError


ROOT = Path(__file__).resolve().parents[2]
ORDER = (
    *("demo", "convert", "inspect", "verify", "tokenizer", "adopt", "export-xai"),
    *("plan", "generate", "serve", "eval", "routing", "curves"),
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
    other = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    other.callback()(cli.root)

    @other.command()
    def work() -> None:
        raise error

    return other


def test_every_command_is_registered():
    """A module with a `..._command` that is not in COMMANDS would be a command that nobody finds."""
    files = [
        file
        for file in Path(cli.__file__).parent.glob("*.py")
        if re.search(r"^def \w+_command\(", file.read_text(), re.M)
    ]
    assert {file.stem.replace("_", "-") for file in files} == set(COMMANDS)
    assert tuple(COMMANDS) == ORDER


def test_help_lists_the_commands_in_order():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == 0
    positions = [result.stdout.index(f"│ {name} ") for name in ORDER]
    assert positions == sorted(positions)
    for panel in {command.panel for command in COMMANDS.values()}:
        assert panel in result.stdout
    assert "Exit codes: 0 success; 1 a check failed; 2 wrong usage or input" in result.stdout


@pytest.mark.parametrize("name", ORDER)
def test_every_help_ends_with_examples_that_parse(name):
    """Each example has the required arguments, none too many, and options that exist."""
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    examples = re.findall(rf"\$ (grok1 {name}\b.*?) *$", shown.stdout, re.M)
    assert examples
    command = COMMANDS[name].load()
    parser = command.make_parser(typer.Context(command))
    for example in examples:
        options, rest, _ = parser.parse_args(shlex.split(example)[2:])
        assert not rest and {param.name for param in command.params if param.required} <= set(options), example


def test_a_command_imports_its_own_module_only():
    code = "import sys; from grok1.cli.commands import COMMANDS; COMMANDS['card'].load(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    commands = {f"grok1.cli.{name.replace('-', '_')}" for name in COMMANDS}
    assert commands & set(loaded) == {"grok1.cli.card"}


HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "matplotlib", "safetensors", "tokenizers")


def imported(*arguments: str) -> set[str]:
    """Top-level modules that a process of `python -m grok1` imports, as `-X importtime` lists them."""
    command = [sys.executable, "-X", "importtime", "-m", "grok1", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in ORDER)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    modules = imported(*arguments)
    assert "grok1" in modules and modules.isdisjoint(HEAVY)


def test_help_takes_at_most_a_third_of_a_second():
    """Processor time of a process of its own, the least of five: other work on the machine does not count."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert grok1("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.3, seconds


def test_the_precision_registry_imports_nothing_heavy():
    code = "import sys, grok1, grok1.precision, grok1.sizing.hardware; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded).isdisjoint(HEAVY)


def test_the_real_command_in_a_pipe():
    """A refusal: nothing on stdout, no colour code, what is wrong and the next step, and nothing more."""
    refused = grok1("card", str(ROOT / "tests"))
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith("Error: ") and "grok1 convert" in refused.stderr
    assert "\x1b" not in refused.stderr and len(refused.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("grok1 ca", ["card"]),
        ("grok1 convert --dt", ["--dtype"]),
        ("grok1 convert --dtype i", ["int8", "int4"]),
        ("grok1 eval --precision nf4", ["nf4", "nf4-double"]),
    ],
)
def test_completion_in_the_shell(words, expected):
    """Commands, options and values, without loading torch."""
    environment = {"_GROK1_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = grok1(**environment)
    assert done.stdout.split() == expected
    code = "import sys\ntry:\n    from grok1.cli import main; main()\nfinally:\n    print(*sys.modules)"
    variables = {**os.environ, **environment}
    loaded = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert set(loaded.stdout.split()).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", ORDER)
def test_ctrl_c_says_one_true_line(name, monkeypatch):
    """At any time, also while the command's module is imported."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(COMMANDS[name]), "load", interrupted)
    result = CliRunner().invoke(app, [name, "x"])
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr == f"Interrupted: {COMMANDS[name].interrupted}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "grok-1", "out", "--max-shard-size", "5"], "expected a size with a unit, such as 5GB"),
        (["adopt", ".", "out", "--max-shard-size", "5"], "expected a size with a unit, such as 5GB"),
        (["push", ".", "name", "--dry-run"], "expected USER/NAME, found 'name'"),
        (["convert", "grok-1", "out", "--push-to", "name", "--dry-run"], "expected USER/NAME, found 'name'"),
        (["card", "user/name"], "hf download user/name --local-dir name"),
        (["inspect", "nothing-here"], "expected a folder, found nothing"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_before_anything_is_done(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2 and message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("columns", ["60", "80"])
def test_help_is_cut_nowhere(name, columns):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": columns, "TERM": "dumb"})
    assert "…" not in shown.stdout
    for param in COMMANDS[name].load().params:
        for option in param.opts:
            if option.startswith("--"):
                assert option in shown.stdout, option


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
            f"Error: {OUT_OF_MEMORY}\n`grok1 plan` shows which precision fits on which GPUs.\n",
        ),
        (
            RuntimeError("shape"),
            3,
            "Internal error (RuntimeError): shape\nThis is a bug. `grok1 --debug work ...` prints the traceback.\n",
        ),
        (KeyboardInterrupt(STOPPED), 130, f"Interrupted: {STOPPED}\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
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
