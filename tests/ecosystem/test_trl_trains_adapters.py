"""TRL's trainers with LoRA on linear and fused experts: SFT learns the answers and their end, DPO's losses are those
of plain PyTorch, GRPO raises its reward."""

import math

import pytest
import torch


pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from tuned_answers import DEMO, PAIRS, check_that_it_stops

from grok1.conversion.convert import convert


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "linear": {"target_modules": [*ATTENTION, "w1", "w2", "w3"]},
    "fused": {
        "target_modules": ATTENTION,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}
COMMON = {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The demo, which has never seen the questions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base") / "hf"
    convert(DEMO, folder, dtype="float32")
    return folder


def load(folder, layout):
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout=layout)
    return model, AutoTokenizer.from_pretrained(folder)


def lora(layout: str) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", **ADAPTERS[layout])


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("layout", ADAPTERS)
def test_sft_learns_the_answers_and_their_end(layout, base, tmp_path):
    model, tokenizer = load(base, layout)
    data = Dataset.from_list([{"prompt": question, "completion": answer} for question, answer in PAIRS])
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=80,
        per_device_train_batch_size=20,
        learning_rate=1e-2,
        warmup_steps=10,
        logging_steps=20,
        **COMMON,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora(layout)
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.1
    check_that_it_stops(trainer.model, tokenizer)
    assert all("lora" in name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)


def dpo_loss(model, tokenizer, beta: float) -> float:
    """The mean of -log sigmoid(beta * margin) over all pairs, by its formula (https://arxiv.org/abs/2305.18290)."""

    @torch.no_grad()
    def log_probability(question: str, answer: str) -> torch.Tensor:
        ids = tokenizer(question + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        start = len(tokenizer(question)["input_ids"])
        logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return logits.gather(1, ids[0, start:, None]).sum()

    found = []
    for row in preferences():
        margins = []
        for name in ("chosen", "rejected"):
            ours = log_probability(row["prompt"], row[name])
            with model.disable_adapter():
                margins.append(ours - log_probability(row["prompt"], row[name]))
        found.append(-torch.nn.functional.logsigmoid(beta * (margins[0] - margins[1])).item())
    return sum(found) / len(found)


def preferences() -> list[dict[str, str]]:
    return [{"prompt": question, "chosen": answer, "rejected": " Nobody knows."} for question, answer in PAIRS]


@pytest.mark.parametrize("layout", ADAPTERS)
def test_dpo_starts_at_log_2_and_its_loss_is_that_of_plain_pytorch(layout, base, tmp_path):
    model, tokenizer = load(base, layout)
    arguments = DPOConfig(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=20,
        per_device_eval_batch_size=20,
        learning_rate=2e-3,
        beta=0.1,
        router_aux_loss_coef=0.0,
        logging_steps=1,
        **COMMON,
    )
    data = Dataset.from_list(preferences())
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=lora(layout),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)  # before the first step both models are one
    assert losses(trainer)[-1] < 0.2
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(dpo_loss(trainer.model.eval(), tokenizer, 0.1), rel=1e-3)


def even_tokens(completion_ids, **_) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("layout", ADAPTERS)
def test_grpo_raises_its_reward(layout, base, tmp_path):
    model, tokenizer = load(base, layout)
    arguments = GRPOConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=2e-2,
        beta=0.0,
        router_aux_loss_coef=0.0,
        logging_steps=1,
        **COMMON,
    )
    data = Dataset.from_list([{"prompt": question} for question, _ in PAIRS])
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        reward_funcs=even_tokens,
        processing_class=tokenizer,
        peft_config=lora(layout),
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert all(map(math.isfinite, losses(trainer)))
    assert 0.3 < rewards[0] < 0.7 and sum(rewards[-3:]) / 3 > rewards[0] + 0.2
