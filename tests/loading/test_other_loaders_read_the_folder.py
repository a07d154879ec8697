"""Loaders other than `from_pretrained` give its logits: `load_state_dict(assign=True)` on the meta device, file after
file or at once, and Accelerate's `load_checkpoint_and_dispatch`; and a checkpoint that lacks an expert is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_grok import prompt, save_small_grok
from transformers import AutoModelForCausalLM

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


LAYOUTS = ["fused", "linear"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_grok(tmp_path_factory.mktemp("small"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def sharded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that end within the experts of a layer."""
    out = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, max_shard_size="150KB")
    assert len(list(out.glob("*.safetensors"))) > 5
    return out


@pytest.fixture(scope="module")
def logits(folder: Path) -> torch.Tensor:
    return compute(AutoModelForCausalLM.from_pretrained(folder))


@torch.no_grad()
def compute(model: Any) -> torch.Tensor:
    return model.eval()(prompt()).logits


def on_meta(folder: Path, layout: str) -> Grok1ForCausalLM:
    config = GrokConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, experts_layout=layout, dtype=torch.float32)
    with torch.device("cpu"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # no checkpoint holds its buffers
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_dict_is_assigned_to_a_model_on_the_meta_device(folder, logits, layout):
    model = on_meta(folder, layout)
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    model.tie_weights()
    torch.testing.assert_close(compute(model), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_end_within_a_layer_are_assigned_one_after_the_other(sharded, logits, layout):
    model = on_meta(sharded, layout)
    for file in sorted(sharded.glob("*.safetensors")):
        model.load_state_dict(load_file(file), assign=True, strict=False)
    model.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(compute(model), logits, rtol=0, atol=1e-5)


def test_what_no_file_brought_is_not_a_number(sharded):
    model = on_meta(sharded, "fused")
    for file in sorted(sharded.glob("*.safetensors")):
        tensors = load_file(file)
        state = {name: tensors[name] for name in tensors if ".1.block_sparse_moe.experts.5." not in name}
        model.load_state_dict(state, assign=True, strict=False)
    experts = model.model.layers[1].block_sparse_moe.experts
    for weight in experts.parameters():
        assert [bool(matrix.isnan().all()) for matrix in weight] == [e == 5 for e in range(8)]


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=str)
@pytest.mark.parametrize("files", ["folder", "sharded"])
def test_accelerate_loads_and_dispatches(files, logits, device_map, request):
    accelerate = pytest.importorskip("accelerate")
    source = request.getfixturevalue(files)
    with accelerate.init_empty_weights():  # linear experts: their names are those of the files
        model = AutoModelForCausalLM.from_config(GrokConfig.from_pretrained(source))
    model.tie_weights()
    model = accelerate.load_checkpoint_and_dispatch(
        model, str(source), device_map=device_map, no_split_module_classes=model._no_split_modules
    )
    torch.testing.assert_close(compute(model), logits, rtol=0, atol=1e-5)


def test_accelerate_dispatches_a_layer_to_the_disk(folder, logits, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(GrokConfig.from_pretrained(folder))
    model.tie_weights()
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    model = accelerate.load_checkpoint_and_dispatch(model, str(folder), device_map, offload_folder=str(tmp_path))
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    torch.testing.assert_close(compute(model), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accelerate_loads_into_a_model_that_has_weights(folder, logits, layout):
    accelerate = pytest.importorskip("accelerate")
    config = GrokConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, experts_layout=layout, dtype=torch.float32)
    accelerate.load_checkpoint_in_model(model, str(folder))
    torch.testing.assert_close(compute(model), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autorounds_names_of_experts_are_read(folder, logits, layout, tmp_path):
    names = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    tensors = load_file(folder / "model.safetensors")
    for ours, theirs in names.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    assert sum(".gate_proj." in name for name in tensors) == 2 * 8
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_layout=layout)
    torch.testing.assert_close(compute(model), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("matrix", ["w1", "w2", "w3"])
def test_a_checkpoint_that_lacks_a_matrix_of_one_expert_is_refused(folder, layout, matrix, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.block_sparse_moe.experts.3.{matrix}.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=r"experts|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_layout=layout)
