"""
`make engines`: one int8 and one int4 folder of the demo, unchanged, through every engine.

    python tests/engines/table/table.py

Converts the demo, computes log-probabilities and text in float64 from weights that are unpacked here by the definition
of their format, asks each engine in its own environment (readers.py) and prints a table. Ends with 1 where an engine
differs by more than its rounding, or stops with another message than the one that is known.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from packed_folders import unpacked_weights

from grok1.conversion.convert import convert
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "grok1" / "demo"
PASSAGES = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
STEPS = 24
# Of float32 log-probabilities from those in float64.
FLOAT32 = 2e-4
# llama.cpp looks GELU up in a table of float16 numbers (tests/interop).
GELU_TABLE = 2e-2
# The root mean square error of bfloat16 is at most so many times that of Transformers.
BFLOAT16 = 3.0


@dataclass(frozen=True)
class Engine:
    """
    Args:
        name: as the table has it.
        reader: its function in readers.py.
        python: of its environment; None: the one that runs this file.
        target: of the Makefile that builds the environment.
        bound: the largest difference in float32.
        bfloat16: run in bfloat16 too. MLX, llama.cpp: with packed weights, or weights that are rounded again.
        stops: what its error says where it does not run these folders on a CPU.
    """

    name: str
    reader: str
    python: Path | None = None
    target: str = ""
    bound: float = FLOAT32
    bfloat16: bool = True
    stops: tuple[str, ...] = ()


ENGINES = (
    Engine("Transformers, with this package", "transformers_with_the_package"),
    Engine("Transformers, remote code alone", "transformers_with_remote_code"),
    Engine("mlx-lm", "mlx_lm", ROOT / ".cache" / "mlx" / "bin" / "python", "test-mlx"),
    Engine(
        "llama.cpp", "llama_cpp", ROOT / ".cache" / "interop" / "venv" / "bin" / "python", "interop", GELU_TABLE, False
    ),
    Engine(
        "vLLM, on a CPU", "vllm", ROOT / ".cache" / "vllm" / "bin" / "python", "test-vllm",
        stops=(
            "Failed to find a kernel that can implement the WNA16 linear layer",
            "No WNA16 MoE backend supports the deployment configuration",
        ),
    ),
)  # fmt: skip


def reference(folder: Path, bits: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """In float64: log-probabilities of every position, greedy tokens; and the questions for the engines."""
    model = Grok1ForCausalLM(GrokConfig.from_pretrained(DEMO), experts_layout="linear").double().eval()
    missing, unexpected = model.load_state_dict(unpacked_weights(folder, bits), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    tokenizer = AutoTokenizer.from_pretrained(folder)
    openings = [passage["opening"] for passage in PASSAGES]
    texts = [tokenizer(passage["opening"] + passage["continuation"])["input_ids"] for passage in PASSAGES]
    prompts = [tokenizer(opening)["input_ids"] for opening in openings]
    choice = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        log_probs = torch.cat([model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in texts])
        greedy = [model.generate(torch.tensor([ids]), **choice)[0, len(ids) :].tolist() for ids in prompts]
    assert log_probs.dtype == torch.float64
    return log_probs.numpy(), np.array(greedy), {"openings": openings, "texts": texts, "steps": STEPS, "ids": prompts}


def ask(engine: Engine, folder: Path, dtype: str, questions: dict[str, Any], scratch: Path) -> dict[str, Any] | str:
    """What it answers, or the last lines of its error."""
    (scratch / "questions.json").write_text(json.dumps(questions))
    words = [str(engine.python or sys.executable), str(Path(__file__).with_name("readers.py")), engine.reader]
    words += [str(folder), dtype, str(scratch / "questions.json"), str(scratch / "answers.npz")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        return done.stdout + done.stderr
    with np.load(scratch / "answers.npz") as arrays:
        return dict(arrays)


@dataclass
class Row:
    """One line of the table, and whether it is as it must be."""

    cells: tuple[str, ...]
    right: bool


def compare(
    engine: Engine, dtype: str, answers: dict[str, Any], expected: np.ndarray, greedy: np.ndarray,
    questions: dict[str, Any], rms_of_transformers: float | None,
) -> Row:  # fmt: skip
    found = answers["log_probs"]
    difference = np.abs(found - expected)
    rms = float(np.sqrt((difference**2).mean()))
    same_token = float((found.argmax(-1) == expected.argmax(-1)).mean())
    texts = int((answers["greedy"] == greedy).all(-1).sum())
    ids = [[token for token in row if token >= 0] for row in answers["prompts"].tolist()] == questions["ids"]
    if dtype == "float32":
        within = difference.max() <= engine.bound and same_token == 1 and texts == len(greedy)
        bound = f"{engine.bound:.0e}"
    else:
        within = rms_of_transformers is None or rms <= BFLOAT16 * rms_of_transformers
        bound = f"{BFLOAT16:g} x the first row's"
    cells = (f"{difference.max():.1e}", f"{rms:.1e}", bound, f"{same_token:.1%}", f"{texts} of {len(greedy)}")
    return Row(cells, bool(within and ids))


def ask_about(engine: Engine, bits: int, dtype: str, scratch: Path, known: tuple[Any, ...], rms: float | None) -> Row:
    expected, greedy, questions = known
    if engine.python is not None and not engine.python.exists():
        return Row((f"not run: `make {engine.target}` builds its environment", "", "", "", ""), True)
    answers = ask(engine, scratch / f"demo-int{bits}", dtype, questions, scratch)
    if isinstance(answers, dict):
        return compare(engine, dtype, answers, expected, greedy, questions, rms)
    for message in engine.stops:
        if message in answers:
            return Row((f'not run here, it stops: "{message}"', "", "", "", ""), True)
    return Row((f"FAILED: {answers.strip()[-400:]}".replace("\n", " "), "", "", "", ""), False)


def main() -> int:
    torch.set_num_threads(1)
    wrong = []
    print("| engine | folder | computes in | largest difference | root mean square | bound | same token | same text |")
    print("| --- | --- | --- | --: | --: | --: | --: | --: |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for bits in (4,):
            convert(DEMO, scratch / f"demo-int{bits}", dtype=f"int{bits}")
            known = reference(scratch / f"demo-int{bits}", bits)
            before = {file.name: file.read_bytes() for file in (scratch / f"demo-int{bits}").iterdir()}
            rms = None
            for dtype in ("float32", "bfloat16"):
                for engine in ENGINES:
                    if dtype == "bfloat16" and (not engine.bfloat16 or engine.stops):
                        continue
                    row = ask_about(engine, bits, dtype, scratch, known, rms)
                    if dtype == "bfloat16" and rms is None:
                        rms = float(row.cells[1])
                    verdict = "" if row.right else " **WRONG**"
                    print(f"| {engine.name} | int{bits} | {dtype} | {' | '.join(row.cells)}{verdict} |", flush=True)
                    wrong += [] if row.right else [f"{engine.name}, int{bits}, {dtype}"]
            after = {file.name: file.read_bytes() for file in (scratch / f"demo-int{bits}").glob("*.*")}
            assert all(after[name] == content for name, content in before.items() if name in after)
    if wrong:
        print(f"Beyond rounding: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
