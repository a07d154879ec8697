"""What other ports compute otherwise, put into vLLM's live model: each trap names (object, attribute, value) of a
layer, or of the whole model. These functions run in the engine's process."""

import torch


def activation(name):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return lambda layer: [(layer.block_sparse_moe.experts.routed_experts, "activation", MoEActivation(name))]


def renormalised_gates(layer):
    return [(layer.block_sparse_moe.experts.router, "renormalize", True)]


def cap(value):
    return lambda layer: [(layer.self_attn.attn.impl, "logits_soft_cap", value)]


def scale_of_other_heads(layer):
    return [(layer.self_attn.attn.impl, "scale", 0.25)]


def bf16_router(layer):
    gate = layer.block_sparse_moe.gate
    weight, _ = gate(torch.eye(gate.input_size))  # transposed; the kernel has packed its own
    return [(gate, "forward", lambda x: ((x.bfloat16() @ weight.bfloat16()).float(), None))]


def rotary_base(layer):
    rotary = layer.self_attn.rotary_emb
    angles = (1e5 ** -(2 * torch.arange(rotary.rotary_dim // 2) / rotary.rotary_dim)) * torch.arange(128.0)[:, None]
    return [(rotary, "cos_sin_cache", torch.cat([angles.cos(), angles.sin()], dim=-1))]


def norms(layer):
    return [layer.pre_attn_norm, layer.post_attn_norm, layer.pre_moe_norm, layer.post_moe_norm]


def bf16_norm_weights(layer):
    return [(norm.weight, "data", norm.weight.data.bfloat16().float()) for norm in norms(layer)]


def eps(layer):
    return [(norm, "variance_epsilon", 1e-6) for norm in norms(layer)]


def next_experts(layer):
    """Every router's choice goes to the expert after it."""
    experts = layer.block_sparse_moe.experts.routed_experts
    return [(experts.w13_weight, "data", experts.w13_weight.data.roll(1, 0))]


def embedding_multiplier(model):
    return [(model.model, "embedding_multiplier", 5.65625)]  # bfloat16's


def output_multiplier(model):
    return [(model.logits_processor, "scale", 0.578125)]  # bfloat16's


TRAPS = {
    "GELU with erf": activation("gelu"),
    "SiLU": activation("silu"),
    "renormalised gates": renormalised_gates,
    "no cap": cap(0),
    "cap of 50": cap(50.0),
    "scale": scale_of_other_heads,
    "router in bfloat16": bf16_router,
    "rotary base of 1e5": rotary_base,
    "norm weights in bfloat16": bf16_norm_weights,
    "eps of 1e-6": eps,
    "experts in another order": next_experts,
    "embedding multiplier": embedding_multiplier,
    "output multiplier": output_multiplier,
}


def put(model, trap):
    if trap.endswith("multiplier"):
        changes = TRAPS[trap](model)
    else:
        changes = [change for layer in model.model.layers for change in TRAPS[trap](layer)]
    model.undo = [(thing, name, getattr(thing, name)) for thing, name, _ in changes]
    for thing, name, value in changes:
        setattr(thing, name, value)


def undo(model):
    for thing, name, value in reversed(model.undo):
        setattr(thing, name, value)


# --------------------------------------------------------------------------------------------------------------------
# Looking on
# --------------------------------------------------------------------------------------------------------------------
def scalars(model):
    """The rounded multipliers, and the dtypes of norm and router weights."""
    weights = [norm.weight for layer in model.model.layers for norm in norms(layer)]
    weights += [layer.block_sparse_moe.gate(torch.eye(model.config.hidden_size))[0] for layer in model.model.layers]
    return {
        "embedding": model.model.embedding_multiplier,
        "output": model.logits_processor.scale,
        "dtypes": sorted({str(weight.dtype) for weight in [*weights, model.model.norm.weight]}),
    }


def watch(model):
    """Keep what attention, experts and norms read and write in the next forward pass."""
    model.seen = {}

    def keep(name):
        def hook(module, args, output):
            model.seen.setdefault(name, (args[-1].clone(), output.clone()))

        return hook

    for name, module in model.named_modules():
        if name.endswith(("self_attn", "block_sparse_moe", "norm")):
            module.register_forward_hook(keep(name))


def save_watched(model, file):
    torch.save(model.seen, file)
