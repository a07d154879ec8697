"""One rank of a launch by torchrun: load, compute, generate and save in each way of being parallel, and note it all.

    torchrun --nproc-per-node 2 run_modes.py JOB.json

The job names the modes, each with a folder, keyword arguments for `DistributedConfig` and for `from_pretrained`. Each rank
writes `rank-N.pt`: for every mode what it saw, or the error.
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


@torch.no_grad()
def look_at(mode: dict, out: Path) -> dict:
    config = DistributedConfig(**mode["distributed"])
    model, info = AutoModelForCausalLM.from_pretrained(
        mode["folder"], distributed_config=config, output_loading_info=True, **mode.get("options", {})
    )
    ids = prompt()
    output = model(ids, output_router_logits=True, use_cache=False)
    seen = {
        "loading": {key: sorted(map(str, value)) for key, value in info.items()},
        "parameters": {name: describe(parameter) for name, parameter in model.named_parameters()},
        "logits": output.logits,
        "router_logits": output.router_logits if hasattr(output, "router_logits") else None,
        "padded": model(
            torch.cat([ids.new_zeros(1, 3), ids[:, :9]], dim=1),
            attention_mask=torch.cat([ids.new_zeros(1, 3), ids.new_ones(1, 9)], dim=1),
        ).logits,
        "greedy": model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight
        if hasattr(model.get_output_embeddings(), "weight") and hasattr(model.get_input_embeddings(), "weight")
        else None,
    }
    if mode.get("save"):
        try:
            model.save_pretrained(out)
        except ValueError as error:
            seen["save_error"] = str(error)
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
