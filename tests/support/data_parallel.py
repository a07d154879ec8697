"""One rank of a launch by torchrun: train a model in each way of being data parallel, and note gradients and weights.

    torchrun --nproc-per-node 2 data_parallel.py JOB.json

The job names the cases: how the model is built, wrapped and checkpointed. A rank writes `rank-N.pt`: of each case the
gradients of each step and the weights after the last, or the error.
"""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_grok1 import Grok1Int8Config


STEPS, LEARNING_RATE = 3, 1e-2


def batch(step: int, rank: int) -> torch.Tensor:
    """3 tokens: fewer than experts, so that ranks choose different ones."""
    return torch.randint(3, 96, (1, 3), generator=torch.Generator().manual_seed(10 * step + rank))


def build(case: dict[str, Any], folder: str) -> Any:
    quantization = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "int8": Grok1Int8Config(),
    }.get(case.get("quantized", ""))
    options = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_layout=case["layout"], use_cache=False, **options
    )
    if case.get("experts"):
        model.set_experts_implementation(case["experts"])
    if case.get("checkpointed"):
        model.activation_checkpointing_enable({"use_reentrant": case.get("reentrant", False)})
    if case.get("lora"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        if case.get("reentrant"):
            model.enable_input_require_grads()
        targets = ["q_proj", "w1", "w2", "w3"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model.train()


def wrap(model: Any, how: str) -> Any:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
        for layer in layers:
            for expert in getattr(layer.block_sparse_moe.experts, "children", tuple)():
                fully_shard(expert, mesh=mesh)  # the hardest: a collective of its own for each expert
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: Any, case: dict[str, Any], ranks: list[int]) -> dict[str, Any]:
    """Three steps of SGD over the mean loss of the batches of `ranks`."""
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=LEARNING_RATE)
    steps, chosen = [], []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            chosen.append(sorted(set(output[2].flatten().tolist())))
            if type(module).__name__ == "Grok1TopKRouter"
            else None
        )
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in ranks:
            ids = batch(step, rank)
            (model(input_ids=ids, labels=ids).loss / len(ranks)).backward()
        steps.append({name: whole(p.grad) for name, p in trained.items() if p.grad is not None})
        optimizer.step()
    hook.remove()
    return {"gradients": steps, "weights": {name: whole(p) for name, p in trained.items()}, "chosen": chosen}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, case in job["cases"].items():
        try:
            model = wrap(build(case, job["folder"]), case["wrap"])
            results[name] = train(model, case, [dist.get_rank()])
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        dist.barrier()
    torch.save(results, Path(job["out"]) / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
