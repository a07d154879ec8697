"""`transformers.Trainer` resumes by `load_state_dict` from files that hold one matrix an expert: every weight comes
back, from one file and from many, in both layouts, and what is not there is reported."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_grok1 import Grok1ForCausalLM


WINDOWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0))
]


def model(config, layout: str, seed: int) -> Grok1ForCausalLM:
    torch.manual_seed(seed)
    return Grok1ForCausalLM(config, experts_layout=layout)


def assert_equal(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights = dict(actual.named_parameters())
    for name, weight in expected.named_parameters():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_a_saved_folder_loads_as_a_state_dict(small_config, tmp_path, layout):
    saved, other = model(small_config, layout, 0), model(small_config, layout, 1)
    saved.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert any(key.endswith("experts.7.w3.weight") for key in state)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert_equal(other, saved)
    assert other.load_state_dict(saved.state_dict()).missing_keys == []  # its own names, of course


def test_files_may_end_within_the_experts_of_a_layer(small_config, tmp_path):
    saved, other = model(small_config, "fused", 0), model(small_config, "fused", 1)
    saved.save_pretrained(tmp_path, max_shard_size="40KB")
    layers = [
        {key.split(".experts.")[0] for key in load_file(file) if ".experts." in key}
        for file in sorted(tmp_path.glob("*.safetensors"))
    ]
    assert sum("model.layers.0.block_sparse_moe" in names for names in layers) > 1
    load_sharded_checkpoint(other, tmp_path, strict=False)
    assert_equal(other, saved)


def test_a_missing_matrix_is_reported(small_config, tmp_path):
    saved, other = model(small_config, "fused", 0), model(small_config, "fused", 1)
    saved.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*model.layers.1.block_sparse_moe.experts.down_proj"):
        other.load_state_dict(state)


class PowerCut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def arguments(out: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_the_plain_trainer_resumes_without_a_warning(small_config, tmp_path, layout, caplog):
    """After a break in the middle, with gradient accumulation, into a model that began as another."""

    def trainer(out: Path, seed: int) -> Trainer:
        options = {"learning_rate": 1e-2, "save_steps": 3, "gradient_accumulation_steps": 2}
        return Trainer(model=model(small_config, layout, seed), args=arguments(out, **options), train_dataset=WINDOWS)

    whole, broken, resumed = (
        trainer(tmp_path / "whole", 0),
        trainer(tmp_path / "broken", 0),
        trainer(tmp_path / "broken", 1),
    )
    whole.train()
    broken.add_callback(PowerCut)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed.train(resume_from_checkpoint=True)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert_equal(resumed.model, whole.model)
    assert not [record for record in caplog.records if "keys in the checkpoint" in record.message]


def test_the_best_checkpoint_comes_back_at_the_end(small_config, tmp_path):
    """Learning so fast that the last model is not the best."""
    options = {
        "learning_rate": 0.3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "constant",
    }
    run = Trainer(
        model=model(small_config, "fused", 0),
        args=arguments(tmp_path, **options),
        train_dataset=WINDOWS[:4],
        eval_dataset=WINDOWS[4:],
    )
    run.train()
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert min(evaluated) < evaluated[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-6)
