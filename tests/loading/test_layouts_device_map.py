"""Device maps: the tied embedding and head stay together, and experts may lie on the disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM


TOKENS = torch.arange(3, 19)[None]
REST = {"model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
SEPARATE = [
    {"model": "cpu", "lm_head": "disk"},
    {**REST, "model.embed_tokens": "disk", "lm_head": "cpu"},
    {"": "cpu", "lm_head": "disk"},
]


@pytest.fixture
def expected(converted):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"))(TOKENS).logits


@pytest.mark.parametrize("device_map", SEPARATE, ids=str)
@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_a_map_that_separates_embedding_and_head_is_refused(converted, tmp_path, device_map, layout):
    with pytest.raises(ValueError, match=r"device_map.*model\.embed_tokens\.weight.*lm_head\.weight.*same device"):
        AutoModelForCausalLM.from_pretrained(
            converted("tiny-1", "float32"), device_map=device_map, offload_folder=tmp_path, experts_layout=layout
        )


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {**REST, "model.embed_tokens": "cpu"}], ids=str)
def test_maps_that_keep_them_together_load(converted, expected, device_map):
    model = AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), device_map=device_map)
    torch.testing.assert_close(model(TOKENS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_layers_on_the_disk_compute_and_save_the_same(converted, tmp_path, expected, layout, read_tensors):
    folder = converted("tiny-1", "float32")
    device_map = {**REST, "model.layers": "disk", "model.embed_tokens": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload", experts_layout=layout
    )
    assert (model(TOKENS).logits - expected).abs().max() <= 1e-5
    if layout == "linear":  # read from the checkpoint's own files
        assert not list((tmp_path / "offload").glob("*"))
    model.save_pretrained(tmp_path / "saved")
    written, original = read_tensors(tmp_path / "saved"), read_tensors(folder)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


@torch.no_grad()
def test_everything_on_the_disk_saves_the_head(converted, tmp_path, expected, read_tensors):
    folder = converted("tiny-1", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert (model(TOKENS).logits - expected).abs().max() <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(read_tensors(tmp_path / "saved")["lm_head.weight"], read_tensors(folder)["lm_head.weight"])
