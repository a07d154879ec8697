"""What `model_memory` reads from the meta device is what the loaded model holds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from grok1.analysis.evaluate import stored_bytes
from grok1.precision import PRECISIONS, loading_options
from grok1.sizing.memory import memory_table, meta_model, model_memory, peak_bytes
from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.cpu_grok1 import keep_freed_memory


CONFIG = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    Grok1ForCausalLM(GrokConfig(**CONFIG)).save_pretrained(out)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_the_bytes_that_the_loaded_model_holds(folder: Path, precision: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **loading_options(folder, precision))
    told = model_memory(GrokConfig(**CONFIG), precision, prompt=16)
    matrices = 3 * (4 + 4 * 3)
    # Beside each matrix bitsandbytes saves its shape, type and block size as text; in 8 bits one byte for the format.
    words = {"int8-bnb": 1, "nf4": 90, "nf4-double": 180, "fp4": 90}.get(precision, 0) * matrices
    assert told.weights_bytes <= stored_bytes(model) <= told.weights_bytes + words
    assert told.weights_bytes == told.outside_layers + sum(told.layers)
    assert told.parameters == 96 * 128 + 128 + 3 * (4 * 128 + 4 * 128 + 128 * 32 * 12 + 4 * 3 * 128 * 256)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(3, 13)[None], past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert told.kv_bytes(10) == held


def test_the_peak_of_known_operations() -> None:
    def call() -> None:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a  # 4000
        c = b.view(10, 100) * 2  # 8000: the view costs nothing
        del b
        c.add_(1)  # in place

    assert peak_bytes(call) == 8000
    given = torch.zeros(1000)
    assert peak_bytes(lambda: given.mul_(2), given=[given]) == 0


def activations(dtype: str, prompt: int) -> tuple[int, int]:
    """Told from the meta device, and measured on the CPU."""
    config = GrokConfig(**{**CONFIG, "num_hidden_layers": 1})
    told = model_memory(config, dtype, prompt=prompt)
    model = Grok1ForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    tokens = torch.randint(3, 96, (1, prompt))
    cache = DynamicCache(config=config)
    keep_freed_memory()  # once in a process; its block is never written to
    measured = peak_bytes(
        lambda: model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1),
        given=[tokens, *model.parameters(), *model.buffers()],
    )
    return told.activations, measured - cache.layers[0].keys.nbytes - cache.layers[0].values.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_on_meta_are_those_of_a_gpu(dtype: str, as_on_a_gpu: None) -> None:
    told, measured = activations(dtype, prompt=64)
    assert measured == told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompt", [1, 64, 1024])
def test_a_cpu_holds_no_more(dtype: str, prompt: int) -> None:
    told, measured = activations(dtype, prompt)
    assert measured <= told


def test_the_released_model() -> None:
    told = model_memory(GrokConfig(), "bfloat16", prompt=512)
    assert told.parameters == 315_684_820_992
    assert told.weights["router"] == 4 * 64 * 8 * 6144
    assert told.weights["experts"] == 2 * 64 * 8 * 3 * 6144 * 32768
    assert told.kv_bytes_per_token == 2 * 2 * 64 * 8 * 128
    assert len(told.layers) == 64 and len(set(told.layers)) == 1
    int8 = model_memory(GrokConfig(), "int8", prompt=512)
    scales = 64 * 2 * (6144 + 2 * 1024 + 8 * 6144 + 8 * (2 * 32768 + 8 * 6144))
    assert int8.weights["attention"] + int8.weights["experts"] == (
        (told.weights["attention"] + told.weights["experts"]) // 2 + scales
    )


def test_a_quantised_folders_config_is_measured_in_the_asked_precision() -> None:
    config = GrokConfig(**CONFIG, quantization_config={"quant_method": "grok1_int8", "scale_blocks": 8})
    assert model_memory(config, "bfloat16", 16) == model_memory(GrokConfig(**CONFIG), "bfloat16", 16)
    assert hasattr(config, "quantization_config")


def test_meta_models_have_the_dtypes_of_loading() -> None:
    dtypes = {name: weight.dtype for name, weight in meta_model(GrokConfig(**CONFIG), "bfloat16").named_parameters()}
    assert dtypes["model.layers.0.block_sparse_moe.gate.weight"] == torch.float32
    assert dtypes["model.layers.0.block_sparse_moe.experts.gate_up_proj"] == torch.bfloat16


def test_the_table_names_every_precision() -> None:
    table = memory_table(GrokConfig(**CONFIG), tokens=64).splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == list(PRECISIONS)
    assert all(row.count("|") == table[0].count("|") for row in table)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"`precision`: expected one of float32, .* found 'int4'"):
        model_memory(GrokConfig(**CONFIG), "int4")
    with pytest.raises(ValueError, match="`prompt`: expected at least 1 token, found 0"):
        model_memory(GrokConfig(**CONFIG), "bfloat16", prompt=0)
