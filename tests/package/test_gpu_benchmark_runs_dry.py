"""`make gpu` works without a card: every part of its dry run gives results, and a part that fails stops no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="needs Triton: pip install triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(out: Path, *options: str) -> tuple[int, dict, list[dict]]:
    """The exit status, the report, and the results as they were written one by one."""
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(out), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads((out / "report.json").read_text())
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == report["results"], ended.stdout
    return ended.returncode, report, lines


def test_every_part_has_results_or_a_reason(tmp_path: Path) -> None:
    status, report, results = run(tmp_path)
    failed = [result for result in results if result["status"] == "FAILED"]
    assert not failed
    assert status == 0
    for name, part in report["parts"].items():
        assert part["state"] == "ran", name
        own = [result for result in results if result["part"] == name]
        assert own, name
        for result in own:
            assert result["status"] in ("ok", "measured", "not here")
            assert result["status"] != "measured" or isinstance(result["value"], int | float)
            assert result["status"] != "not here" or result["detail"].removeprefix("not here: ")
    assert len(report["parts"]) == 19
    text = (tmp_path / "report.md").read_text()
    for name in report["parts"]:
        assert f"\n## {name}\n" in text
    for key in ("card", "torch", "transformers", "triton"):
        assert f"- {key}: " in text
    # The winners are lines of the kernel's table.
    for few in (True, False):
        for bits in (8, 4):
            assert f"\n    ({few}, {bits}): Tile(" in text


def test_a_part_that_hangs_raises_or_crashes_stops_no_other(tmp_path: Path) -> None:
    names = ["card", "golden", "speed of int8", "training"]
    faults = ["--inject", "card=hang", "--inject", "golden=raise", "--inject", "speed of int8=crash"]
    status, report, results = run(tmp_path, "--parts", ";".join(names), "--part-limit", "20", *faults)
    assert status == 1
    states = [report["parts"][name]["state"] for name in names]
    assert states[0] == "cut: its time limit was reached"
    assert states[1] == "ran"
    assert states[2].startswith("its worker died with status 9")
    assert states[3] == "ran"
    failed = {result["part"]: result["detail"] for result in results if result["status"] == "FAILED"}
    assert list(failed) == names[:3]
    assert "RuntimeError: injected" in failed["golden"]
    assert {result["status"] for result in results if result["part"] == "training"} <= {"ok", "measured"}
    assert "## Failed" in (tmp_path / "report.md").read_text()


def test_the_total_limit_is_stated_for_what_it_leaves_out(tmp_path: Path) -> None:
    _, report, _ = run(tmp_path, "--parts", "card;golden", "--limit", "0.5")
    assert {part["state"] for part in report["parts"].values()} == {"not run: the total limit of 0.5 s was reached"}


def test_without_a_card_and_without_dry_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--parts", "card"]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    assert ended.returncode == 1
    assert "no CUDA device: `--dry` runs without one" in ended.stderr
