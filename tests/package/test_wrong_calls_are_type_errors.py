"""mypy checks calls across the tool folders on the installed layout: a wrong one is an error, a right one is not."""

import subprocess
import sys

import pytest
from conftest import ROOT


pytest.importorskip("mypy", reason="needs the extra `check`")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    layout = tmp_path_factory.mktemp("installed") / "layout"
    subprocess.run(["make", "-s", "layout", f"LAYOUT={layout}"], cwd=ROOT, check=True)
    return layout


# A call into each folder, and the error codes that mypy reports for it.
CALLS = {
    "from grok1.conversion.release import release_files\ny: int = release_files()\n": ["assignment"],
    "from grok1.conversion.names import checkpoint_entries\ncheckpoint_entries()\n": ["call-arg"],
    "from grok1.precision import find_precision\ny: int = find_precision(3)\n": ["arg-type", "assignment"],
    "from grok1.sizing.hardware import Gpus\ny: Gpus = Gpus.parse('8x80GB')\n": [],
}


def test_a_wrong_call_into_another_folder_is_an_error(layout):
    for number, code in enumerate(CALLS):
        (layout.parent / f"probe{number}.py").write_text(code)
    probes = [f"probe{number}.py" for number in range(len(CALLS))]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports=silent"]
    command += ["--no-error-summary", "--cache-dir", str(layout.parent / "cache"), *probes]
    run = subprocess.run(
        command, cwd=layout.parent, env={"MYPYPATH": str(layout)}, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in run.stdout.splitlines() if ": error: " in line]
    found = [sorted(line[:-1].rsplit("[", 1)[1] for line in lines if line.startswith(probe)) for probe in probes]
    assert found == list(CALLS.values()), run.stdout + run.stderr
