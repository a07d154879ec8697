"""`grok1 plan`: its bytes are those of loaded models, its verdicts follow from them, its commands can be pasted."""

import ast
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import typer
from small_grok import SIZES, prompt, save_small_grok
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedTokenizerFast
from transformers.integrations.accelerate import get_device
from typer.testing import CliRunner

from grok1.cli.plan import plan_command
from grok1.sizing.hardware import GB, Gpus
from grok1.sizing.memory import meta_model, peak_bytes
from grok1.sizing.plan import RESERVED, make_plan, suggestions
from grok1.sizing.request import Request
from modeling_grok1 import GrokConfig
from modeling_grok1.quantization_grok1 import Grok1Int8Config


ROOT = Path(__file__).parents[2]
# Large enough that what is not proportional to anything (routers, norms, indices) does not decide.
LARGER = {**SIZES, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 640, "max_position_embeddings": 512}
LOADING = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization_config": Grok1Int8Config(scale_blocks=8)},
    "nf4": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    },
    "int8-bnb": {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_small_grok(tmp_path_factory.mktemp("plan"), **LARGER)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(640)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)
    return folder


def weight_bytes(model) -> int:
    """Parameters, a tied head once, and what bitsandbytes keeps beside them."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.code.nbytes
        if getattr(parameter, "SCB", None) is not None:
            total += parameter.SCB.nbytes
    return total


@pytest.mark.parametrize("precision", LOADING)
@torch.no_grad()
def test_weights_cache_and_activations_are_those_of_a_loaded_model(folder, precision, as_on_a_gpu):
    config, context, batch, chunk = GrokConfig(**LARGER), 384, 3, 128
    share = make_plan(
        Request(config, Gpus(1, 1, 80 * GB), precision, context=context, batch=batch, chunk=chunk)
    ).shares[0]

    model = AutoModelForCausalLM.from_pretrained(folder, **LOADING[precision])
    assert share.weights == pytest.approx(weight_bytes(model), rel=0.05)

    ids = prompt(context, batch, vocab_size=640)
    cache = DynamicCache(config=model.config)
    for start in range(0, context - chunk, chunk):
        model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    peak = peak_bytes(
        lambda: model(ids[:, -chunk:], past_key_values=cache, logits_to_keep=1),
        given=[*model.parameters(), *model.buffers(), *held],
    )
    full = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert share.cache == pytest.approx(full, rel=0.05)
    assert share.free == 80 * GB - RESERVED - share.weights - share.cache - share.activations
    if precision in ("float32", "bfloat16"):
        # The peak is in the last layer, when every layer's cache has been written anew.
        assert share.activations == pytest.approx(peak - full, rel=0.05)


@pytest.fixture(scope="module")
def released():
    return GrokConfig()


def test_the_released_model_on_eight_gpus_of_80_gb(released):
    plan = make_plan(Request(released, Gpus.parse("8x80GB"), "int8", context=8192, batch=4))
    assert (plan.parallel, plan.fits, len(plan.shares)) == ("tp", True, 8)
    # 316.6 GB of int8 weights and 8.6 GB of cache, an eighth each; routers and norms on every GPU.
    assert plan.shares[0].weights == pytest.approx(39.6 * GB, rel=0.005)
    assert plan.shares[0].cache == 64 * 8192 * 4 * 2 * 128 * 2
    bfloat16 = make_plan(Request(released, Gpus.parse("8x80GB"), "bfloat16"))
    assert not bfloat16.fits
    assert bfloat16.shares[0].weights == pytest.approx(78.9 * GB, rel=0.005)
    offered = [text for text, _ in suggestions(Request(released, Gpus.parse("8x80GB"), "bfloat16"))]
    assert offered[:3] == ["precision int8", "precision nf4", "2 machines, each 8 x 80 GB instead"]


@pytest.mark.parametrize(
    ("gpus", "precision", "parallel"),
    [
        ("8x80GB", "bfloat16", "tp"),
        ("2x4x141GB", "bfloat16", "tp"),
        ("16x80GB", "bfloat16", "pp"),
        ("5x141GB", "bfloat16", "pp"),
        ("4x48GB", "nf4", "pp"),
        ("1x141GB", "int8", "one"),
    ],
)
def test_auto_takes_the_fastest_way_that_the_sizes_allow(released, gpus, precision, parallel):
    plan = make_plan(Request(released, Gpus.parse(gpus), precision))
    assert plan.parallel == parallel
    total = sum(share.weights for share in plan.shares)
    alone = make_plan(Request(released, Gpus.parse("1000GB"), precision)).shares[0].weights
    assert total == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_what_cannot_be_cut_is_refused_by_name(released, parallel):
    with pytest.raises(ValueError, match=r"`tp_size`: expected a divisor of `num_key_value_heads` \(8\), found 16"):
        make_plan(Request(released, Gpus.parse("16x80GB"), parallel=parallel))
    with pytest.raises(ValueError, match=r"nf4 has one nn\.Linear per matrix"):
        make_plan(Request(released, Gpus.parse("8x80GB"), "nf4", parallel=parallel))


def test_bad_requests_are_refused_all_at_once(released):
    with pytest.raises(ValueError) as refusal:
        make_plan(Request(released, Gpus.parse("8x80GB"), "int3", context=10**6, batch=0, parallel="dp"))
    assert all(name in str(refusal.value) for name in ("`precision`", "`context`", "`batch`", "`parallel`"))


def test_every_suggestion_fits(released):
    request = Request(released, Gpus.parse("2x24GB"), "bfloat16", batch=2)
    assert not make_plan(request).fits
    offered = suggestions(request)
    assert [(plan.parallel, plan.precision) for _, plan in offered] == [
        ("offload", "bfloat16"),
        ("offload", "int8"),
    ]
    assert all(plan.fits for _, plan in offered)
    for _, plan in suggestions(Request(released, Gpus.parse("4x80GB"), "bfloat16")):
        assert plan.fits


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("8x80GB", Gpus(1, 8, 80 * GB)),
        ("24 gb", Gpus(1, 1, 24 * GB)),
        ("2x8x141GB", Gpus(2, 8, 141 * GB)),
        ("4x24GiB", Gpus(1, 4, 24 * 2**30)),
    ],
)
def test_hardware_is_read_as_it_is_said(text, gpus):
    assert Gpus.parse(text) == gpus


@pytest.mark.parametrize("text", ["80", "8x", "x80GB", "0x80GB", "eight", "2x2x2x80GB"])
def test_hardware_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match="8x80GB"):
        Gpus.parse(text)


def run(*arguments: str):
    app = typer.Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_a_table_and_its_exit_code_is_the_verdict(folder):
    fits = run("--gpus", "2x8GB", "--precision", "bfloat16", "--context", "256", "--parallel", "ep", str(folder))
    assert fits.exit_code == 0, fits.output
    assert all(word in fits.output for word in ("weights", "KV cache", "activations", "free", "It fits", "torchrun"))
    too_small = run("--gpus", "1.02GB", "--precision", "float32", "--context", "256", str(folder))
    assert too_small.exit_code == 1
    assert "GB short on the fullest GPU" in too_small.output
    assert "What would make it fit" in too_small.output


def test_json_holds_the_same_plan(folder):
    result = run("--gpus", "2x8GB", "--context", "256", "--json", str(folder))
    document = json.loads(result.stdout)
    plan = make_plan(Request(GrokConfig(**LARGER), Gpus.parse("2x8GB"), context=256, folder=str(folder)))
    assert document["fits"] is True
    assert [share["weights"] for share in document["shares"]] == [share.weights for share in plan.shares]
    assert document["command"] == plan.command


def test_the_python_command_runs_as_pasted(folder, capsys):
    """On the CPU in the place of GPU 0."""
    plan = make_plan(Request(GrokConfig(**LARGER), Gpus.parse("24GB"), context=256, batch=2, folder=str(folder)))
    exec(plan.command.replace("device_map=0", "device_map='cpu'"), {})
    assert capsys.readouterr().out.split()


def test_the_offload_command_runs_as_pasted(folder, capsys):
    request = Request(GrokConfig(**LARGER), Gpus.parse("1.02GB"), "float32", context=256, folder=str(folder))
    plan = next(plan for text, plan in suggestions(request) if "experts on disk" in text and "float32" in text)
    assert plan.parallel == "offload"
    exec(plan.command.replace("device_map=0", "device_map='cpu'"), {})
    assert capsys.readouterr().out.split()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_device_map_of_a_pasted_command_is_the_table(folder, count):
    config = GrokConfig(**LARGER)
    plan = make_plan(Request(config, Gpus(1, count, 80 * GB), context=256, parallel="pp", folder=str(folder)))
    given = next(node for node in ast.walk(ast.parse(plan.command)) if getattr(node, "arg", None) == "device_map")
    device_map = eval(ast.unparse(given.value))
    on_each = dict.fromkeys(range(count), 0)
    for name, parameter in meta_model(config, "bfloat16").named_parameters():
        if name != "lm_head.weight":
            on_each[get_device(device_map, name)] += parameter.nbytes
    assert list(on_each.values()) == [share.weights for share in plan.shares]


@pytest.mark.parametrize(
    ("gpus", "parallel", "wanted"),
    [
        ("4x80GB", "tp", ["--nproc-per-node", "4", "--tp", "4"]),
        ("4x80GB", "ep", ["--tp", "4", "--ep", "4"]),
        ("2x2x80GB", "pp", ["--nnodes", "2", "--nproc-per-node", "2", "--pp", "4"]),
    ],
)
def test_the_torchrun_command_is_one_that_the_example_understands(folder, monkeypatch, gpus, parallel, wanted):
    plan = make_plan(
        Request(GrokConfig(**LARGER), Gpus.parse(gpus), context=256, parallel=parallel, folder=str(folder))
    )
    words = shlex.split(plan.command)
    assert words[0] == "torchrun"
    assert " ".join(wanted[-2:]) in plan.command
    assert set(wanted) <= set(words)
    script = words.index("examples/generate_distributed.py")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", words[script:])
    from generate_distributed import arguments

    parsed = arguments()
    assert (parsed.folder, parsed.prompt) == (str(folder), "The answer to life")
    assert parsed.tp * parsed.pp == 4
