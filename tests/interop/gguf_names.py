"""Where a tensor of a hub folder lies in a GGUF file, and what lies there."""

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize


# Hub name -> GGUF name. The experts of a layer become one tensor with the expert as its first dimension.
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "pre_attn_norm": "attn_norm",
    "post_attn_norm": "attn_output_norm",
    "pre_moe_norm": "ffn_norm",
    "post_moe_norm": "post_ffw_norm",
}
EXPERT = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def gguf_place(name: str) -> tuple[str, int | None]:
    """The GGUF tensor of a hub tensor, and its expert there."""
    if name in TOP:
        return TOP[name], None
    layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name).groups()
    expert = re.fullmatch(r"block_sparse_moe\.experts\.(\d+)\.(w\d)", rest)
    if expert:
        return f"blk.{layer}.{EXPERT[expert[2]]}.weight", int(expert[1])
    return f"blk.{layer}.{LAYER[rest]}.weight", None


def read_gguf(file: Path) -> dict[str, tuple[GGMLQuantizationType, torch.Tensor]]:
    """The type of every tensor of a GGUF file, and its values in float32."""
    return {
        tensor.name: (tensor.tensor_type, torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))))
        for tensor in GGUFReader(file).tensors
    }
