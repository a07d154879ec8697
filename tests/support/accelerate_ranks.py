"""One rank of a launch by torchrun: a model goes through `Accelerator.prepare` with FSDP2, and trains.

    torchrun --nproc-per-node N accelerate_ranks.py MODE FOLDER OUT

Accelerate 1.15 applies FSDP on accelerators only; on a CPU it ignores the plugin and takes DDP. `accelerator_on_cpu`
makes that one choice for it: what `prepare` does then is Accelerate's own.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, ParallelismConfig
from data_parallel import LEARNING_RATE, STEPS, batch, whole
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_grok1  # noqa: F401


# Processes, sizes for Accelerate, and where Transformers shards the model while it loads, its own.
MODES: dict[str, dict[str, Any]] = {
    "fsdp": {"processes": 2, "sizes": {"dp_shard_size": 2}},
    "ep-fsdp": {
        "processes": 4,
        "sizes": {"dp_shard_size": 2, "tp_size": 2},
        "distributed": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    },
}


def batches(mode: str) -> int:
    """Batches of a step: ranks of a tensor-parallel group read the same one."""
    return MODES[mode]["processes"] // MODES[mode]["sizes"].get("tp_size", 1)


def accelerator_on_cpu(**sizes: int) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Grok1DecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    state, parallelism = accelerator.state, ParallelismConfig(**sizes)
    state.distributed_type, state.fsdp_plugin, state.parallelism_config = DistributedType.FSDP, plugin, parallelism
    state.device_mesh = parallelism.get_device_mesh("cpu")
    assert accelerator.is_fsdp2
    return accelerator


def run(mode: str, folder: str) -> dict[str, Any]:
    accelerator = accelerator_on_cpu(**MODES[mode]["sizes"])
    options: dict[str, Any] = {"use_cache": False}
    if "distributed" in MODES[mode]:
        options["distributed_config"] = DistributedConfig(**MODES[mode]["distributed"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    prepared = {name: whole(parameter) for name, parameter in model.named_parameters()}
    held = {name: parameter.to_local().numel() for name, parameter in model.named_parameters()}  # type: ignore[operator]
    losses = []
    for step in range(STEPS):
        ids = batch(step, dist.get_rank() * batches(mode) // dist.get_world_size())
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    trained = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return {"prepared": prepared, "held": held, "losses": losses, "trained": trained}


def main() -> None:
    mode, folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    torch.save(run(mode, folder), Path(out) / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
