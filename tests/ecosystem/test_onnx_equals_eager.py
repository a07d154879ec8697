"""torch.onnx.export of the default model: ONNX Runtime gives eager's logits at every batch and length."""

from pathlib import Path

import pytest
import torch
from torch.export import Dim

from modeling_grok1 import Grok1ForCausalLM


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@torch.no_grad()
@pytest.mark.parametrize("experts", ["grok1", "grouped_mm", "batched_mm"])
def test_onnx_runtime_gives_the_logits_of_eager(small_config, tmp_path: Path, caplog, experts):
    torch.manual_seed(0)
    small_config.initializer_range, small_config.max_position_embeddings = 0.2, 512
    model = Grok1ForCausalLM(small_config).eval()
    model.set_experts_implementation(experts)
    tokens = torch.randint(3, 96, (2, 40))
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=400)
    program = torch.onnx.export(
        model,
        (),
        kwargs={"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False},
        dynamic_shapes={
            "input_ids": {0: batch, 1: length},
            "attention_mask": {0: batch, 1: length},
            "use_cache": None,
        },
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for rows, columns in ((1, 2), (2, 40), (3, 17), (2, 400)):
        tokens = torch.randint(3, 96, (rows, columns))
        mask = torch.ones_like(tokens)
        mask[0, : columns // 3] = 0
        inputs = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
        logits = torch.from_numpy(session.run(None, inputs)[0])
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
