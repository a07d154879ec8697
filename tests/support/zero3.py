"""One rank of a launch by torchrun: DeepSpeed's ZeRO-3 loads, computes, trains and saves, for each layout of experts.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 zero3.py FOLDER OUT
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from data_parallel import LEARNING_RATE, STEPS, batch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import modeling_grok1  # noqa: F401


CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # cut every parameter
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
}
PROMPT = torch.arange(5, 12)[None]


def run(folder: str, layout: str, out: Path) -> dict[str, Any]:
    deepspeed_config = HfDeepSpeedConfig(CONFIG)  # while it lives, from_pretrained cuts the parameters
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout=layout, use_cache=False)
    cut = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=PROMPT).logits
        engine(input_ids=torch.tensor([[5 + 7 * dist.get_rank()]]))  # ranks choose different experts
    engine.train()
    losses = []
    for step in range(STEPS):
        ids = batch(step, dist.get_rank())
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    state = engine._zero3_consolidated_16bit_state_dict()
    unset_hf_deepspeed_config()
    del deepspeed_config
    model.save_pretrained(out, is_main_process=dist.get_rank() == 0, state_dict=state)  # on each rank, as Trainer does
    dist.barrier()
    return {"cut": cut, "logits": logits, "losses": losses}


def main() -> None:
    folder, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    results = {layout: run(folder, layout, out / layout) for layout in ("fused", "linear")}
    torch.save(results, out / f"rank-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
