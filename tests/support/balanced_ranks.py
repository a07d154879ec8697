"""One rank of a launch by torchrun: an optimizer step of Grok1Trainer with the load-balancing loss.

    torchrun --nproc-per-node 2 balanced_ranks.py FOLDER OUT BATCH ACCUMULATE

A rank writes OUT/rank-N.pt: the gradients of the step, and the logged loss.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from grok1.training import Grok1Trainer


# Four equal rows: the load-balancing loss of each is that of all together.
ROW = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(0))
ROWS = 4


def step(folder: str, out: Path, batch: int, accumulate: int) -> dict:
    """The gradients of one optimizer step over all rows, and its loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_router_logits=True)
    model.config.router_aux_loss_coef = 0.5
    arguments = TrainingArguments(
        str(out / "run"),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": ROW, "labels": ROW}] * ROWS
    trainer = Grok1Trainer(model=model, args=arguments, train_dataset=data)
    gradients: dict[str, torch.Tensor] = {}
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"gradients": gradients, "loss": loss, "processes": arguments.world_size}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[2])
    result = step(sys.argv[1], out, int(sys.argv[3]), int(sys.argv[4]))
    torch.save(result, out / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
