"""The hub folder is what the loaders of llama.cpp, SGLang and vLLM read: names, shapes, and keys that are never null.

What they read is written down here from sglang 0.5.23 (srt/models/grok.py), vllm 0.24.0 (the last release that has
model_executor/models/grok1.py) and the converter of llama-cpp-python 0.3.36 (conversion/grok.py). `make interop` runs
the last of them; the two servers need GPUs that hold a Grok-1: they were read, not run.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from activations import replace_activation
from safetensors import safe_open

from grok1.conversion.convert import convert
from grok1.conversion.names import hub_tensors
from grok1.conversion.release import release_sizes
from grok1.conversion.shards import plan_shards
from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.modeling_grok1 import Grok1Attention, Grok1RMSNorm, Grok1TopKRouter


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "grok1" / "demo"

Shapes = dict[str, tuple[int, ...]]

# Read as an attribute without a default: an engine stops where one is missing.
REQUIRED = {
    "sglang": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("num_local_experts", "num_experts_per_tok", "max_position_embeddings", "rms_norm_eps", "pad_token_id"),
        *("embedding_multiplier_scale", "output_multiplier_scale"),
    ),
    "vllm": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "tie_word_embeddings"),
    ),
    "llama.cpp": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_local_experts"),
        *("embedding_multiplier_scale", "output_multiplier_scale"),
    ),
}
# Read with a default that stands in for a missing key, but not for null: None would reach max(), a product or a shape.
NEVER_NULL = {
    "sglang": ("moe_intermediate_size", "head_dim", "attn_logit_softcapping", "rope_theta", "rope_parameters"),
    "vllm": (
        *("moe_intermediate_size", "num_experts", "num_experts_per_tok", "attn_logit_softcapping"),
        *("router_logit_softcapping", "attn_output_multiplier", "embedding_multiplier_scale"),
        *("output_multiplier_scale", "rope_parameters"),
    ),
    "llama.cpp": ("attn_logit_softcapping", "router_logit_softcapping", "attn_output_multiplier", "head_dim"),
}
# Where the engine's own default is not Grok-1.
EXACT = {
    "sglang": {"load_presharded_moe": False, "residual_moe": False},  # by default experts count as cut for each rank
    "vllm": {"router_logit_softcapping": 0.0, "moe_router_renormalize": False, "residual_moe": False},  # 30, True
    "llama.cpp": {"router_logit_softcapping": 0.0},
}
# Keys of Grok-2 and of xAI's own servers that change what is computed.
ABSENT = {
    "sglang": (
        *("rope_type", "context_len", "rope_rotate_half_dims", "attn_temperature_len", "final_logit_softcapping"),
        *("attn_logit_softcapping_method", "load_presharded_attn", "load_presharded_embedding", "load_presharded_mlp"),
        *("replicate_embedding", "replicate_lm_head", "merge_gate_up"),
    ),
    "vllm": ("final_logit_softcapping", "attn_logit_softcapping_method", "moe_renormalize", "rope_type"),
    "llama.cpp": ("rope_type", "attn_temperature_len", "final_logit_softcapping"),
}
ENGINES = tuple(REQUIRED)


def server_parameters(config: SimpleNamespace, engine: str) -> dict[tuple[str, str | int | None], tuple[int, ...]]:
    """Every (parameter, part of it) that a server wants filled, with the shape of what fills it."""
    D, d = config.hidden_size, config.head_dim  # noqa: N806
    attention, moe = {"sglang": ("self_attn", "block_sparse_moe"), "vllm": ("attn", "moe_block")}[engine]
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    wanted: dict[tuple[str, str | int | None], tuple[int, ...]] = {
        ("model.embed_tokens.weight", None): (config.vocab_size, D),
        ("model.norm.weight", None): (D,),
    }
    if engine == "sglang":  # never ties
        wanted["lm_head.weight", None] = (config.vocab_size, D)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        wanted[f"{prefix}.{attention}.qkv_proj.weight", "q"] = (queries, D)
        wanted[f"{prefix}.{attention}.qkv_proj.weight", "k"] = (keys, D)
        wanted[f"{prefix}.{attention}.qkv_proj.weight", "v"] = (keys, D)
        wanted[f"{prefix}.{attention}.o_proj.weight", None] = (D, queries)
        wanted[f"{prefix}.{moe}.gate.weight", None] = (config.num_experts, D)
        for norm in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            wanted[f"{prefix}.{norm}.weight", None] = (D,)
        for expert in range(config.num_experts):
            for name, part, shape in (
                ("w13_weight", "w1", (config.intermediate_size, D)),
                ("w13_weight", "w3", (config.intermediate_size, D)),
                ("w2_weight", "w2", (D, config.intermediate_size)),
            ):
                wanted[f"{prefix}.{moe}.experts.{name}", f"{part} of expert {expert}"] = shape
    return wanted


def read_by_server(name: str, engine: str, num_experts: int) -> tuple[str, str | None] | None:
    """The (parameter, part of it) that a server fills with a tensor. It looks for parts of the name, in this order."""
    if engine == "vllm":
        if name.startswith("lm_head"):
            return None  # skipped: tied
        name = name.replace(".self_attn.", ".attn.").replace(".block_sparse_moe.", ".moe_block.")
    dense = {"sglang": ("gate_proj", "up_proj"), "vllm": ("mlp.gate_proj", "mlp.up_proj")}[engine]
    for part in ("q_proj", "k_proj", "v_proj"):
        if part in name:
            return name.replace(part, "qkv_proj"), part[0]
    for part in dense:  # of Grok-2
        if part in name:
            return name.replace(part, "gate_up_proj"), part
    for expert in range(num_experts):
        for part, merged in (("w1", "w13_"), ("w2", "w2_"), ("w3", "w13_")):
            if f"experts.{expert}.{part}." in name:
                return name.replace(f"experts.{expert}.{part}.", f"experts.{merged}"), f"{part} of expert {expert}"
    return name, None


def filled(stored: Shapes, engine: str, num_experts: int) -> dict[tuple[str, str | None] | None, tuple[int, ...]]:
    places = {name: read_by_server(name, engine, num_experts) for name in stored}
    assert max(Counter(place for place in places.values() if place).values()) == 1, "two tensors for one place"
    return {place: stored[name] for name, place in places.items() if place}


def stored_shapes(folder: Path) -> Shapes:
    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in names})
    return shapes


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Callable[..., Path]:
    """demo("bfloat16", layout="hub"): the bundled checkpoint, converted."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(dtype: str = "bfloat16", layout: str = "hub") -> Path:
        if (dtype, layout) not in folders:
            folders[dtype, layout] = tmp_path_factory.mktemp(f"{dtype}-{layout}") / "demo"
            convert(DEMO, folders[dtype, layout], dtype=dtype, layout=layout)
        return folders[dtype, layout]

    return folder


@pytest.fixture(scope="module", params=["release", "demo", "saved again"])
def contents(request, demo, tmp_path_factory) -> tuple[dict, Shapes]:
    """config.json and the stored shapes: of the release as planned, of the demo, of the demo after save_pretrained."""
    if request.param == "release":
        folder = tmp_path_factory.mktemp("release")
        GrokConfig().save_pretrained(folder)
        shapes = {name: tensor.shape for name, tensor in hub_tensors(release_sizes()).items()}
    else:
        folder = demo()
        if request.param == "saved again":
            folder = tmp_path_factory.mktemp("saved")
            Grok1ForCausalLM.from_pretrained(demo()).save_pretrained(folder, max_shard_size="2MB")
        shapes = stored_shapes(folder)
    return json.loads((folder / "config.json").read_text()), shapes


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_every_tensor_fills_one_place_and_no_place_is_left(engine, contents):
    config, shapes = contents
    wanted = server_parameters(SimpleNamespace(**config), engine)
    assert filled(shapes, engine, config["num_experts"]) == wanted


@pytest.mark.parametrize("engine", ENGINES)
def test_the_keys_are_there_and_never_null(engine, contents):
    config, _ = contents
    assert config["architectures"] == ["Grok1ForCausalLM"]
    for key in (*REQUIRED[engine], *NEVER_NULL[engine]):
        assert config.get(key) is not None, key
    for key, value in EXACT[engine].items():
        assert config[key] == value and type(config[key]) is type(value), key
    assert not set(ABSENT[engine]) & set(config)
    assert None not in config.values()


def test_no_config_can_be_made_with_such_a_null():
    for key in {key for keys in NEVER_NULL.values() for key in keys} - {"rope_parameters"}:
        with pytest.raises(ValueError, match="None"):
            GrokConfig(**{key: None})
    assert GrokConfig(rope_parameters=None).to_dict()["rope_parameters"] == {
        "rope_theta": 10000.0,
        "rope_type": "default",
    }


def test_what_the_engines_derive_is_what_the_config_says(contents):
    """Both servers scale attention by 1/sqrt(head_dim); vLLM and llama.cpp take hidden_size / heads for head_dim."""
    config, _ = contents
    assert config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]
    assert config["attn_output_multiplier"] == pytest.approx(config["head_dim"] ** -0.5, rel=1e-15)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 10000.0
    assert config["num_experts"] == config["num_local_experts"]
    assert config["moe_intermediate_size"] == config["intermediate_size"]
    assert config["attn_logit_softcapping"] == 30.0


def test_config_and_model_classes_come_in_the_order_that_vllm_imports_them(contents):
    config, _ = contents
    assert list(config["auto_map"])[:3] == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


def test_llama_cpp_sees_a_tensor_of_a_layer_after_the_last_expert():
    """Its converter merges experts when the next tensor that is none arrives, and needs that one's layer number."""
    tensors = hub_tensors(release_sizes()).values()
    largest = max(tensor.nbytes for tensor in tensors)
    for max_shard_size in range(largest, 40 * largest, largest // 4):
        waiting, merged = 0, 0
        for shard in plan_shards(tensors, max_shard_size):
            for name in sorted(tensor.name for tensor in shard.tensors):  # as in the header of the file
                if ".block_sparse_moe.experts." in name:
                    waiting += 1
                elif waiting:
                    assert re.match(r"model\.layers\.\d+\.", name), (
                        f"{max_shard_size}: {waiting} experts wait at {name}"
                    )
                    merged, waiting = merged + waiting, 0
        assert (waiting, merged) == (0, 64 * 8 * 3)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_fused_layout_fills_no_expert(engine, demo):
    """Both servers then stop, with a list of what is missing."""
    folder = demo(layout="fused")
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    left = server_parameters(config, engine).keys() - filled(stored_shapes(folder), engine, config.num_experts).keys()
    assert len(left) == config.num_hidden_layers * config.num_experts * 3
    assert all(".experts." in parameter for parameter, _ in left)


def test_an_int8_folder_names_a_method_that_engines_know(demo):
    """compressed-tensors, packed integers: one scale per group, router and head left out."""
    config = json.loads((demo("int8") / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["ignore"] == ["lm_head", r"re:.*block_sparse_moe\.gate$"]


def erf_gelu(model: Grok1ForCausalLM) -> None:
    replace_activation(model, torch.nn.GELU())


def silu(model: Grok1ForCausalLM) -> None:
    replace_activation(model, torch.nn.SiLU())


def capped_router(model: Grok1ForCausalLM) -> None:
    def cap(module: Grok1TopKRouter, inputs: tuple, output: tuple) -> tuple:
        logits = 30.0 * torch.tanh(output[0] / 30.0)
        return logits, *logits.softmax(-1).topk(module.top_k)

    for module in model.modules():
        if isinstance(module, Grok1TopKRouter):
            module.register_forward_hook(cap)


def router_in_bfloat16(model: Grok1ForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Grok1TopKRouter):
            module.weight.data = module.weight.data.bfloat16().float()


def norms_in_bfloat16(model: Grok1ForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Grok1RMSNorm):
            module.weight.data = module.weight.data.bfloat16().float()


def scaled_attention_output(model: Grok1ForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Grok1Attention):
            module.o_proj.weight.data *= model.config.attn_output_multiplier


def no_soft_cap(model: Grok1ForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, Grok1Attention):
            module.softcap = 1e6


def unscaled_embedding(model: Grok1ForCausalLM) -> None:
    model.model.embed_tokens.multiplier = dict.fromkeys(model.model.embed_tokens.multiplier, 1.0)


DEVIATIONS = {
    "GELU with erf": erf_gelu,
    "router logits capped at 30": capped_router,
    "router weights in bfloat16": router_in_bfloat16,
    "norm weights in bfloat16": norms_in_bfloat16,
    "attention output times its multiplier": scaled_attention_output,
    "no soft-cap of attention": no_soft_cap,
    "SiLU in the experts": silu,
    "no embedding multiplier": unscaled_embedding,
}


@pytest.fixture(scope="module")
def effects(demo) -> dict[str, tuple[float, float, int]]:
    """What each deviation does to the logits of the recited passages: largest, mean, likeliest tokens that stay."""
    from transformers import AutoTokenizer

    folder = demo("float32")
    passages = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([each["opening"] + each["continuation"] for each in passages], padding=True, return_tensors="pt")
    real = batch["attention_mask"].bool()

    def logits(deviate: Callable[[Grok1ForCausalLM], None] = lambda model: None) -> torch.Tensor:
        model = Grok1ForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout="linear").eval()
        deviate(model)
        with torch.inference_mode():
            return model(**batch).logits[real]

    right = logits()
    found = {}
    for name, deviate in DEVIATIONS.items():
        wrong = logits(deviate)
        difference = (right - wrong).abs()
        same = (right.argmax(-1) == wrong.argmax(-1)).sum().item()
        found[name] = (difference.max().item(), difference.mean().item(), same)
    assert len(right) == 1038
    return found


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_the_documented_effect_of_a_deviation_is_measured(deviation, effects):
    """docs/interop.md, the table of what SGLang and vLLM do otherwise."""
    text = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(deviation)} \|.*$", text, re.M)
    largest, mean, same = row.strip("| ").split(" | ")[-3:]
    found = effects[deviation]
    assert float(largest) == pytest.approx(found[0], rel=0.25), found
    assert float(mean) == pytest.approx(found[1], rel=0.1), found
    assert int(same) == pytest.approx(found[2], abs=5), found
