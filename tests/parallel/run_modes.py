"""One rank of a launch by torchrun: load, compute, generate and save in each way of being parallel, and note it all.

    torchrun --nproc-per-node 2 run_modes.py JOB.json

The job names the modes, each with a folder and keyword arguments for `DistributedConfig`. A rank writes `rank-N.pt`,
what it saw in every mode, or the error.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from small_grok import prompt
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_grok1  # noqa: F401


def describe(tensor: torch.Tensor) -> dict:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return {"dtype": tensor.dtype, "whole": tuple(tensor.shape), "here": tuple(local.shape)}


def is_tied(model) -> bool | None:
    """Whether head and embedding hold the same values, where this rank has both."""
    head, embedding = (
        getattr(module, "weight", None) for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head is None or embedding is None:
        return None
    pair = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in (head, embedding)]
    return head is embedding or torch.equal(*pair)


@torch.no_grad()
def look_at(mode: dict, out: Path) -> dict:
    model, info = AutoModelForCausalLM.from_pretrained(
        mode["folder"], distributed_config=DistributedConfig(**mode["distributed"]), output_loading_info=True
    )
    seen = {
        "loading": {key: sorted(map(str, value)) for key, value in info.items()},
        "parameters": {name: describe(parameter) for name, parameter in model.named_parameters()},
        "tied": is_tied(model),
    }
    routed: dict[int, set[int]] = {}
    hooks = [
        layer.block_sparse_moe.gate.register_forward_hook(
            lambda module, args, output, i=i: routed.setdefault(i, set()).update(output[2].flatten().tolist())
        )
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer, "block_sparse_moe")
    ]
    ids = prompt()
    seen["logits"] = model(ids).logits
    seen["routed"] = routed
    for hook in hooks:
        hook.remove()
    padding = ids.new_zeros(1, 3)
    seen["padded"] = model(
        torch.cat([padding, ids[:, :9]], dim=1), attention_mask=torch.cat([padding, ids.new_ones(1, 9)], dim=1)
    ).logits
    seen["greedy"] = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
    if mode.get("save"):
        model.save_pretrained(out)
    return seen


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, mode in job["modes"].items():
        try:
            results[name] = look_at(mode, Path(job["out"]) / f"saved-{name}")
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        dist.barrier()
    torch.save(results, Path(job["out"]) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
