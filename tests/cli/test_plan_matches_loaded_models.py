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

from grok1.cli import app as grok1_app
from grok1.cli.plan import plan_command
from grok1.distributed import arguments
from grok1.sizing.commands import vllm_command
from grok1.sizing.hardware import CARDS, GB, Gpus, parse_macs
from grok1.sizing.mac import mac_plans
from grok1.sizing.memory import meta_model, peak_bytes
from grok1.sizing.models import find_model
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


def always(folder):
    """The same folder in every precision."""
    return lambda precision: str(folder)


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
        # The peak is in the last layer, when every layer's cache has been written again.
        assert share.activations == pytest.approx(peak - full, rel=0.05)


@pytest.fixture(scope="module")
def released():
    return GrokConfig()


def test_the_released_model_on_eight_gpus_of_80_gb(released):
    """Cards sold as 80 GB have 84.9e9 usable bytes: bfloat16 fits, 78.9 GB of weights on each."""
    plan = make_plan(Request(released, Gpus.parse("8x80GB"), "int8", context=8192, batch=4))
    assert (plan.parallel, plan.fits, len(plan.shares)) == ("tp", True, 8)
    # 316.6 GB of int8 weights and 8.6 GB of cache, an eighth each; routers and norms on every GPU.
    assert plan.shares[0].weights == pytest.approx(39.6 * GB, rel=0.005)
    assert plan.shares[0].cache == 64 * 8192 * 4 * 2 * 128 * 2
    bfloat16 = make_plan(Request(released, Gpus.parse("8x80GB"), "bfloat16"))
    assert bfloat16.fits and 4 * GB < bfloat16.shares[0].free < 5 * GB
    assert bfloat16.shares[0].weights == pytest.approx(78.9 * GB, rel=0.005)
    exactly = make_plan(Request(released, Gpus.parse("8x80000000000B"), "bfloat16"))
    assert not exactly.fits


def test_the_speed_is_bounded_by_what_a_token_reads(released):
    """By hand: 83.8e9 active parameters, the embedding read as the head, and the cache."""
    reads = 2 * 83_756_587_008 + 4 * 8192 * 64 * 8 * 128  # routers and norms are float32: 0.01 % more
    for gpus, share, bandwidth in (("1xMI325X", 1, 6000), ("8xH100", 8, 3350), ("4xH200", 4, 4800)):
        plan = make_plan(Request(released, Gpus.parse(gpus)))
        assert plan.tokens_per_second == pytest.approx(share * bandwidth * GB / reads, rel=0.001)
    pipeline = make_plan(Request(released, Gpus.parse("5xH200")))
    assert pipeline.tokens_per_second == pytest.approx(4800 * GB / reads, rel=0.001)
    batch = make_plan(Request(released, Gpus.parse("8xH200"), batch=1000, context=8))
    everything = 2 * 315_684_820_992 + 1000 * 2 * 8 * 64 * 8 * 128 * 2
    assert batch.tokens_per_second == pytest.approx(1000 * 8 * 4800 * GB / everything, rel=0.01)
    assert make_plan(Request(released, Gpus.parse("8x100GiB"))).tokens_per_second is None


def test_experts_outside_the_gpu_are_bounded_by_the_link_and_the_disk(released):
    request = Request(released, Gpus.parse("1xRTX4090"), "int8", host_memory=400 * GB, disk=7 * GB)
    plans = dict(suggestions(request))
    host, disk = (plans[f"one GPU, experts {where} (int8)"] for where in ("in host memory", "on disk, 7 GB/s"))
    routed = 309.7e9 / 4
    cached = 12 / 309.7
    assert disk.tokens_per_second == pytest.approx(7e9 / routed / (1 - cached), rel=0.02)
    assert host.tokens_per_second == pytest.approx(32e9 / routed / (1 - cached), rel=0.1)
    assert "--experts-on cpu --expert-cache 12GB" in host.command
    assert list(plans).index("one GPU, experts on disk, 7 GB/s (int8)") > list(plans).index(
        "one GPU, experts in host memory (int8)"
    )
    without = dict(suggestions(Request(released, Gpus.parse("1xRTX4090"), "int8")))
    assert not any("host memory" in text for text in without)


def test_macs_are_those_of_the_documentation(released):
    """docs/mlx.md has the same figures."""
    plans = {plan.format.name: plan for plan in mac_plans(released, *parse_macs("512"), context=1)}
    assert plans["int8"].weights == pytest.approx(326.3e9, rel=1e-3) and plans["int8"].fits
    assert plans["int8"].tokens_per_second == pytest.approx(9.4, abs=0.05)
    assert plans["mlx 4 bit"].weights == pytest.approx(177.6e9, rel=1e-3)
    assert plans["mlx 4 bit"].tokens_per_second == pytest.approx(17.4, abs=0.05)
    assert "mlx_lm.generate --model grok-1-int8 --trust-remote-code" in plans["int8"].command
    smaller = {plan.format.name: plan.fits for plan in mac_plans(released, *parse_macs("256"), context=8192)}
    assert smaller == {"int8": False, "int4": True, "mlx 4 bit": True}
    two = mac_plans(released, *parse_macs("2x256"), context=8192)[0]
    assert two.fits and "mlx.launch --hosts mac1,mac2 --backend ring" in two.command
    with pytest.raises(ValueError, match="divides the 8 key and value heads, found 3"):
        mac_plans(released, *parse_macs("3x512"), context=8192)
    with pytest.raises(ValueError, match=r"`--mac`: expected gigabytes, 64, .*found '500'"):
        parse_macs("500")


def test_several_machines_are_served_by_ray(released):
    one = vllm_command(Request(released, Gpus.parse("8xH100"), folders=always("FOLDER")))
    assert one == "vllm serve FOLDER --tensor-parallel-size 8 --max-model-len 8192"
    two = vllm_command(Request(released, Gpus.parse("2x8xH100"), folders=always("FOLDER")))
    assert two.splitlines()[0].startswith("ray start --head")
    assert "--tensor-parallel-size 8" in two and "--pipeline-parallel-size 2" in two
    assert vllm_command(Request(released, Gpus.parse("8xH100"), "nf4")) is None


def test_the_folder_of_a_command_holds_the_precision(folder, tmp_path):
    model = find_model(str(folder))
    assert model.folder_for("bfloat16") == model.folder_for("nf4") == str(folder)
    assert model.folder_for("int8") == "grok-1-int8" and model.folder_for("int4") == "grok-1-int4"
    assert find_model(None).folder_for("float32") == "grok-1-hf"
    with pytest.raises(
        ValueError,
        match=r"expected a converted folder with config.json, USER/NAME on the hub, or a preset \(demo, grok-1\)",
    ):
        find_model(str(tmp_path))


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
        ("offload", "int8"),
        ("offload", "bfloat16"),
    ]
    assert all(plan.fits for _, plan in offered)
    for _, plan in suggestions(Request(released, Gpus.parse("4x80GB"), "bfloat16")):
        assert plan.fits


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "memory", "name"),
    [
        ("8xH100", 1, 8, 84.9e9, "H100"),
        ("8x80GB", 1, 8, 84.9e9, "A100-80"),
        ("24 gb", 1, 1, 23.6e9, "L4"),
        ("2x4090", 1, 2, 25.2e9, "RTX4090"),
        ("2x8xh200", 2, 8, 150.0e9, "H200"),
        ("8xMI300X", 1, 8, 206.0e9, "MI300X"),
        ("4x24GiB", 1, 4, 24 * 2**30, None),
        ("2x25769803776B", 1, 2, 24 * 2**30, None),
        ("30GB", 1, 1, 30e9, None),
    ],
)
def test_hardware_is_read_as_it_is_sold(text, nodes, per_node, memory, name):
    gpus = Gpus.parse(text)
    assert (gpus.nodes, gpus.per_node) == (nodes, per_node)
    assert gpus.memory == pytest.approx(memory, rel=2e-3)
    assert (gpus.card and gpus.card.name) == name


def test_no_card_has_more_usable_memory_than_its_chips():
    """Sold in GB that are GiB: usable is less, and not by a tenth."""
    for card in CARDS.values():
        assert 0.9 * card.sold * 2**30 < card.usable < card.sold * 2**30


@pytest.mark.parametrize("text", ["80", "8x", "x80GB", "0x80GB", "eight", "2x2x2x80GB", "8xH900"])
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
    plan = make_plan(Request(GrokConfig(**LARGER), Gpus.parse("2x8GB"), context=256, folders=always(folder)))
    assert document["fits"] is True
    assert [share["weights"] for share in document["shares"]] == [share.weights for share in plan.shares]
    assert document["command"] == plan.command


def test_the_python_command_runs_as_pasted(folder, capsys):
    """On the CPU in the place of GPU 0."""
    plan = make_plan(Request(GrokConfig(**LARGER), Gpus.parse("24GB"), context=256, batch=2, folders=always(folder)))
    exec(plan.command.replace("device_map=0", "device_map='cpu'"), {})
    assert capsys.readouterr().out.split()


def test_the_offload_command_runs_as_pasted(folder):
    request = Request(GrokConfig(**LARGER), Gpus.parse("1.02GB"), "float32", context=256, folders=always(folder))
    plan = next(plan for text, plan in suggestions(request) if "experts on disk" in text and "float32" in text)
    assert plan.parallel == "offload"
    words = shlex.split(plan.command.splitlines()[-1].replace("cuda:0", "cpu").replace("The answer to life", "w5 w6"))
    result = CliRunner().invoke(grok1_app, [*words[1:], "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("w5 w6")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_device_map_of_a_pasted_command_is_the_table(folder, count):
    config = GrokConfig(**LARGER)
    plan = make_plan(Request(config, Gpus(1, count, 80 * GB), context=256, parallel="pp", folders=always(folder)))
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
def test_the_torchrun_command_is_one_that_the_launcher_understands(folder, monkeypatch, gpus, parallel, wanted):
    plan = make_plan(
        Request(
            GrokConfig(**LARGER),
            Gpus.parse(gpus),
            context=256,
            parallel=parallel,
            folders=always(folder),
        )
    )
    words = shlex.split(plan.command)
    assert words[0] == "torchrun"
    assert " ".join(wanted[-2:]) in plan.command
    assert set(wanted) <= set(words)
    assert words[words.index("-m") :][:2] == ["-m", "grok1.distributed"]
    monkeypatch.setattr(sys, "argv", words[words.index("-m") + 1 :])
    monkeypatch.setenv("LOCAL_RANK", "0")
    parsed = arguments()
    assert (parsed.folder, parsed.prompt) == (str(folder), "The answer to life")
    assert parsed.tp * parsed.pp == 4
