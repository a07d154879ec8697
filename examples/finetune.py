"""Fine-tune a converted folder on a JSONL of prompts and answers, on one device or on several.

    python examples/finetune.py grok-1-hf answers.jsonl tuned
    accelerate launch --config_file examples/fsdp2.yaml examples/finetune.py grok-1-hf answers.jsonl tuned

Each line of the file is {"prompt": "...", "completion": "..."}; the completion begins with a space where the text has
one. The completions and their end are the targets. The last line of output is the loss on the lines that are held out.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.data import DataCollatorForSeq2Seq

from grok1.training import Grok1Trainer


def examples(path: Path, tokenizer) -> list[dict[str, list[int]]]:
    """Tokens and labels of each line; prompts have the label -100, which is no target."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        found.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=4, help="lines of a step on each device")
    parser.add_argument("--held-out", type=int, default=8, help="lines at the end of the file that are not trained on")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, output_router_logits=True)
    rows = examples(arguments.data, tokenizer)
    trainer = Grok1Trainer(
        model=model,
        args=TrainingArguments(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            activation_checkpointing=True,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),  # else processes on CPUs do not find each other
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows[: -arguments.held_out],
        eval_dataset=rows[-arguments.held_out :],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(json.dumps({"before": before, "after": after, "processes": trainer.args.world_size}))
    trainer.accelerator.end_training()  # ends the process group: its threads must not outlive the main one


if __name__ == "__main__":
    main()
