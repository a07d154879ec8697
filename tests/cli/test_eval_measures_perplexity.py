"""`grok1 eval`: perplexity and agreement as a direct computation gives them, and the command around it."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import grok1
from grok1.analysis.evaluate import evaluate, stored_bytes, windows
from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.loading import load_model
from grok1.precision import PRECISIONS
from modeling_grok1 import GrokConfig


DEMO = Path(grok1.__file__).parent / "demo"
TEXT = "\n".join(
    passage["opening"] + passage["continuation"] for passage in json.loads((DEMO / "passages.json").read_text())[:3]
)
CONTEXT = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demonstration checkpoint, converted to float32, bfloat16 and int8."""
    root = tmp_path_factory.mktemp("demo")
    for dtype in ("float32", "bfloat16", "int8"):
        convert(DEMO, root / dtype, dtype=dtype)
    return {dtype: root / dtype for dtype in ("float32", "bfloat16", "int8")}


@torch.no_grad()
def directly(folder: Path, dtype: torch.dtype) -> tuple[float, torch.Tensor, int]:
    """Mean negative log-likelihood and likeliest tokens, token by token from float64 probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    nats, likeliest = [], []
    for start in range(0, len(ids), CONTEXT):
        window = ids[start : start + CONTEXT]
        probabilities = model(torch.tensor([window])).logits[0].double().softmax(-1)
        for place, token in enumerate(window[1:]):
            nats.append(-math.log(probabilities[place, token]))
            likeliest.append(probabilities[place].argmax())
    return sum(nats) / len(nats), torch.stack(likeliest), len(nats)


def test_perplexity_and_agreement_are_those_of_a_direct_computation(folders: dict[str, Path]) -> None:
    nats, likeliest, count = directly(folders["float32"], torch.float32)
    _, reference, _ = directly(folders["bfloat16"], torch.bfloat16)
    seen: list[tuple[int, int]] = []
    found = evaluate(
        folders["float32"],
        TEXT,
        against=folders["bfloat16"],
        context=CONTEXT,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.predicted == count
    assert found.nats == pytest.approx(nats, abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=1e-6)
    assert found.agreement == pytest.approx((likeliest == reference).double().mean().item(), abs=1e-12)
    assert 0.9 < found.agreement < 1  # so that a comparison with itself would be seen
    assert found.precision == "float32"
    done, total = zip(*seen, strict=True)
    half = len(done) // 2  # one model after the other, each with its own total
    assert list(done[:half]) == sorted(set(done)) == list(done[half:]) and set(total) == {done[-1]}


def test_int8_has_the_perplexity_of_the_float32_conversion(folders: dict[str, Path]) -> None:
    expected = evaluate(folders["float32"], TEXT, context=CONTEXT)
    found = evaluate(folders["int8"], TEXT, precision="float32", context=CONTEXT)
    assert f"{found.perplexity:.6f}" == f"{expected.perplexity:.6f}"
    assert found.precision == "int8 in float32"
    assert found.agreement is None


def test_a_model_agrees_with_itself(folders: dict[str, Path]) -> None:
    found = evaluate(folders["bfloat16"], TEXT, against=folders["bfloat16"], context=CONTEXT)
    assert found.agreement == 1.0


@pytest.mark.parametrize("precision", [row.name for row in PRECISIONS.values() if row.quantization is not None])
def test_every_precision_is_measured_and_smaller(folders: dict[str, Path], precision: str) -> None:
    plain = evaluate(folders["bfloat16"], TEXT, context=CONTEXT)
    found = evaluate(folders["bfloat16"], TEXT, precision=precision, context=CONTEXT, against=folders["bfloat16"])
    config = GrokConfig.from_pretrained(folders["bfloat16"])
    embedding = 2 * config.vocab_size * config.hidden_size  # bytes that stay in bfloat16
    limit = 0.52 if precision.startswith("int8") else 0.29  # with the scales
    assert found.bytes - embedding < limit * (plain.bytes - embedding)
    assert found.perplexity == pytest.approx(plain.perplexity, rel=0.03 if precision.startswith("int8") else 0.25)
    assert found.agreement is not None and found.agreement > 0.75


def test_stored_bytes_counts_a_tied_head_once(folders: dict[str, Path]) -> None:
    model = load_model(folders["float32"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert stored_bytes(model) == 4 * sum(weight.numel() for weight in model.parameters())


def test_windows_do_not_overlap_and_predict_something() -> None:
    pieces = windows(torch.arange(9), 4)
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the ninth alone predicts nothing
    assert [len(piece) for piece in windows(torch.arange(10), 4)] == [4, 4, 2]
    with pytest.raises(ValueError, match="at least 2 tokens, found 1"):
        windows(torch.arange(1), 4)
    with pytest.raises(ValueError, match="`context`: expected at least 2"):
        windows(torch.arange(9), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 513}, "at most the model's 512, found 513"),
        ({"precision": "float16"}, "`precision`: expected one of float32, bfloat16, .*found 'float16'"),
        ({"precision": "bnb-8bit"}, "`precision`: 'bnb-8bit' is called 'int8-bnb' here"),
    ],
)
def test_options_are_refused(folders: dict[str, Path], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(folders["float32"], TEXT, **options)


def test_the_command_prints_figures_or_json(folders: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    expected = evaluate(folders["float32"], TEXT, context=CONTEXT)
    common = ["eval", str(folders["float32"]), "--text", str(text), "--context", str(CONTEXT), "--device-map", "cpu"]

    result = CliRunner().invoke(app, common)
    assert result.exit_code == 0, result.output
    assert f"perplexity  {expected.perplexity:.4f}" in result.stdout
    assert "the first token of each not predicted" in result.stdout

    result = CliRunner().invoke(app, [*common, "--json", "--against", str(folders["float32"])])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["perplexity"] == expected.perplexity
    assert 0.9 < found["agreement"] < 1

    result = CliRunner().invoke(app, [*common, "--precision", "bnb-4bit"])
    assert result.exit_code == 2 and "is called 'nf4' here" in result.output
