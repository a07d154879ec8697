"""`pip install .` gives `modeling_grok1` and `grok1`, and nothing else."""

import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel as pip builds it, from a copy of what git would ship (the build writes into its source folder)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if not name.startswith(("tests/", "docs/", "benchmarks/", "examples/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_two_import_names(wheel):
    tops = {Path(name).parts[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modeling_grok1", "grok1"}


def test_every_python_file_of_the_package_is_in_the_wheel(wheel):
    folders = {"modeling_grok1": "modeling_grok1", "grok1": "grok1"} | {
        name: f"grok1/{name}" for name in ("configuration", "conversion", "model_card")
    }
    expected = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in folders.items()
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_the_data_files_are_in_the_wheel(wheel):
    names = set(wheel.namelist())
    assert {"modeling_grok1/py.typed", "grok1/py.typed"} <= names
    assert {"grok1/configuration/grok-1.json", "grok1/configuration/demo.json"} <= names
    assert {"grok1/demo/config.json", "grok1/demo/tokenizer.model"} <= names
    assert sum(name.startswith("grok1/demo/ckpt-0/tensor") for name in names) == 50
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_command_is_installed(wheel):
    entry_points = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "grok1 = grok1.cli:main" in wheel.read(entry_points).decode()


def test_the_requirements_hold_the_tested_ranges(wheel):
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    required = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    required = {line for line in required if "extra ==" not in line}
    names = {line.split(">")[0].split("<")[0].split("=")[0].split("[")[0].strip() for line in required}
    assert {"torch", "transformers", "safetensors", "sentencepiece", "tokenizers", "bitsandbytes"} <= names
    assert {"accelerate", "huggingface_hub", "typer", "rich"} <= names or {
        "accelerate",
        "huggingface-hub",
        "typer",
        "rich",
    } <= names
    assert all("<" in line for line in required), required


def test_the_constraints_lie_within_the_requirements(monkeypatch):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: None)
    scope = runpy.run_path(str(ROOT / "setup.py"))
    for line in scope["REQUIREMENTS"]:
        requirement = Requirement(line)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), line
