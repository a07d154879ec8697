"""TRL's SFTTrainer, as its documentation uses it: tuned on twenty answers, the model generates EOS where they end."""

import pytest
import torch


pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from tuned_answers import KINDS, PAIRS, check_that_it_stops, prepared


def dataset(kind: str) -> Dataset:
    """Prompts and completions: as text, to which TRL adds the end token, or as messages for the chat template."""
    if kind == "text":
        return Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in PAIRS])
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for question, answer in PAIRS
        ]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_model_stops_by_itself(kind, tmp_path):
    torch.set_num_threads(1)
    tokenizer, model = prepared(kind, tmp_path / "tokenizer")
    arguments = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=80,
        per_device_train_batch_size=20,
        learning_rate=5e-3,
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset(kind), processing_class=tokenizer)
    ends = [row["input_ids"][-1] for row in trainer.train_dataset]
    assert ends == [tokenizer.eos_token_id] * len(PAIRS)
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log][-1] < 0.1
    check_that_it_stops(model, tokenizer)
    trainer.save_model(str(tmp_path / "tuned"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    check_that_it_stops(loaded, AutoTokenizer.from_pretrained(tmp_path / "tuned"))
