"""Native int8 computes what the float32 conversion computes, and its weights are xAI's bits, in both layouts."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM


LAYOUTS = ["fused", "linear"]
NAMES = ["tiny-1", "tiny-8"]
TOLERANCE = 1e-4


def load(folder, layout="fused", **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, experts_layout=layout, **kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_float32_logits_are_xais_and_those_of_the_float32_folder(converted, reference, name, layout):
    golden = reference(name, "fp32")
    inputs = {"input_ids": golden.tokens, "attention_mask": golden.attention_mask}
    logits = load(converted(name, "int8"), layout, dtype=torch.float32)(**inputs).logits
    assert logits.dtype == torch.float32
    assert (logits - golden.logits).abs().max() <= TOLERANCE
    # In float64, where the order of a sum does not matter, they are the same network.
    logits, plain = (
        load(converted(name, dtype), layout, dtype=torch.float64)(**inputs).logits for dtype in ("int8", "float32")
    )
    assert (logits - plain).abs().max() <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_greedy_decoding_gives_xais_20_tokens(converted, reference, name):
    golden = reference(name, "fp32")
    model = load(converted(name, "int8"), dtype=torch.float32)
    output = model.generate(
        golden.prompt,
        attention_mask=torch.ones_like(golden.prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert output[0, golden.prompt.shape[1] :].tolist() == golden.greedy.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_bf16_is_at_most_3_times_as_far_from_float32_as_xais_bf16(converted, reference, layout):
    ours, theirs = [], []
    for name in NAMES:
        exact, rounded = reference(name, "fp32"), reference(name, "bf16")
        model = load(converted(name, "int8"), layout)
        assert model.dtype == torch.bfloat16  # what config.json says
        logits = model(exact.tokens, attention_mask=exact.attention_mask).logits
        ours.append((logits.float() - exact.logits).flatten())
        theirs.append((rounded.logits - exact.logits).flatten())
    ratio = torch.cat(ours).square().mean().sqrt() / torch.cat(theirs).square().mean().sqrt()
    assert ratio <= 3.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_and_scale_has_xais_bits(golden, converted, name, layout):
    from grok1.conversion.xai.checkpoint import read_tensor_file

    def xai(path):
        file = read_tensor_file(golden / name / "ckpt-0" / f"tensor{paths.index(path):05d}_000")
        weight, scales = torch.from_numpy(file.weight.read()), torch.from_numpy(file.scales.read().view("int16"))
        return weight.mT, scales.mT  # (..., out, in) int8 and (..., out, G), the bits of a bfloat16

    def equal(weight, scale, path, expert=...):
        expected_weight, expected_scale = (array[expert] for array in xai(path))
        assert weight.dtype == torch.int8
        assert scale.dtype == torch.bfloat16
        assert torch.equal(weight, expected_weight)
        assert torch.equal(scale.view(torch.int16), expected_scale)

    about = json.loads((golden / name / "about.json").read_text())
    paths = about["paths"]
    model = load(converted(name, "int8"), layout)
    for index, layer in enumerate(model.model.layers):
        prefix = f"transformer/decoder_layer_{index}"
        for ours, theirs in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "linear"}.items():
            linear = getattr(layer.self_attn, ours)
            equal(linear.weight, linear.weight_scale, f"{prefix}/multi_head_attention/{theirs}/w")
        experts = layer.block_sparse_moe.experts
        if layout == "linear":
            for e, expert in enumerate(experts):
                for ours, theirs in {"w1": "linear", "w2": "linear_1", "w3": "linear_v"}.items():
                    linear = getattr(expert, ours)
                    equal(linear.weight, linear.weight_scale, f"{prefix}/moe/{theirs}/w", e)
        else:
            gates, ups = zip(
                experts.gate_up_proj.chunk(2, dim=1), experts.gate_up_proj_scale.chunk(2, dim=1), strict=True
            )
            equal(*gates, f"{prefix}/moe/linear/w")
            equal(*ups, f"{prefix}/moe/linear_v/w")
            equal(experts.down_proj, experts.down_proj_scale, f"{prefix}/moe/linear_1/w")
            assert experts.down_proj_scale.shape[-1] == about["scale_blocks"]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_forward_leaves_no_float_copy_of_a_weight_behind(converted, reference, layout):
    model = load(converted("tiny-8", "int8"), layout)
    config = model.config
    hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = config.num_attention_heads + config.num_key_value_heads
    matrices = layers * (2 * hidden * heads * config.head_dim + config.num_experts * 3 * hidden * ffn)

    def sizes():
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        attributes = {
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }
        assert not attributes
        return {name: value.nbytes for name, value in named.items()}

    before = sizes()
    model(reference("tiny-8", "fp32").tokens)
    assert sizes() == before
    assert sum(p.numel() for p in model.parameters() if p.dtype == torch.int8) == matrices
    quantised = {name: p for name, p in model.named_parameters() if re.search(r"_proj|\.w[123]\.", name)}
    scales = sum(p.nbytes for name, p in quantised.items() if name.endswith("_scale"))
    assert sum(p.nbytes for p in quantised.values()) == matrices + scales
